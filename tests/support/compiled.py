"""One trace for many plans, where a test compiles a model under each; and what Inductor needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from ilm_compile import partitioning as front_door
from ilm_compile.program.copy import copy_program
from ilm_compile.program.program import Program
from ilm_compile.runtime import compiled


@contextmanager
def traced_once() -> Iterator[None]:
    """Let `partition` trace a model once for all plans."""
    traced: dict[int, tuple[Any, Program]] = {}
    trace = front_door.trace

    def remembered(model: nn.Module, **keywords: Any) -> Program:
        if id(model) not in traced:
            traced[id(model)] = (keywords, trace(model, **keywords))
        assert traced[id(model)][0] == keywords
        return copy_program(traced[id(model)][1])

    with mock.patch.object(front_door, "trace", remembered):
        yield


def skip_without_inductor() -> None:
    """Skip the test where Inductor has no C++ compiler: users' regions run as written there."""
    if lack := compiled.missing_for(compiled.INDUCTOR, torch.device("cpu")):
        pytest.skip(lack)

"""A model's traced program, kept by this process for all plans that it is compiled under.

Tracing is most of what compiling a tiny model costs, and does not depend on the plan.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import nn

from ilm_compile import partitioning as front_door
from ilm_compile.program.copy import copy_program
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace

_kept: dict[Hashable, Program] = {}


@contextmanager
def traced_once(key: Hashable) -> Iterator[None]:
    """Within it models are compiled from what was traced first under this key.

    key: all that the model, its inputs and its loss are made from.
    """

    def kept(model: nn.Module, **keywords: Any) -> Program:
        if key not in _kept:
            _kept[key] = trace(model, **keywords)
        return copy_program(_kept[key])

    with mock.patch.object(front_door, "trace", kept):
        yield

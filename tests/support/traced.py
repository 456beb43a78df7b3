"""A model's traced program, kept by this process for all plans that it is compiled under.

Tracing is most of what compiling a tiny model costs, and does not depend on the plan.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

from torch import nn

from ilm_compile import partitioning as front_door
from ilm_compile.program.copy import copy_program
from ilm_compile.program.plan import Plan
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


class _CompiledError(Exception):
    """Raised where a model that is compiled would be put on its rank."""


_compiled: dict[tuple[Hashable, str], Program] = {}


@contextmanager
def compiled_before(key: Hashable) -> Iterator[None]:
    """Within it models are compiled as under `compile_only`, if that was called with this key."""
    compile_now = front_door._compile

    def kept(program: Program, plan: Plan, how: Any, like: Program | None = None) -> Program:
        done = _compiled.pop((key, plan.to_json()), None)
        return done or compile_now(program, plan, how, like)

    with mock.patch.object(front_door, "_compile", kept):
        yield


def forget_compiled() -> None:
    """Let go of what `compile_only` has kept."""
    _compiled.clear()


def compile_only(key: Hashable, parallelize: Callable[[], object]) -> None:
    """Do of `parallelize` what needs no other rank, and keep its program for this plan."""
    compile_now = front_door._compile

    def keep(program: Program, plan: Plan, *rest: Any) -> Program:
        _compiled[key, plan.to_json()] = compile_now(program, plan, *rest)
        raise _CompiledError

    with mock.patch.object(front_door, "_compile", keep), suppress(_CompiledError):
        parallelize()

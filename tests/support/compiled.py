"""Worlds whose ranks share one compilation: traced once per model, partitioned once per plan.

A `CompiledWorld` keeps one process, the compiler. For each call it partitions the model as
`parallelize` would on every rank, then forks the ranks, which find the program in their memory.
That every rank comes to the same program by itself is for the tests that start interpreters.
"""

from __future__ import annotations

import importlib
import multiprocessing
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any
from unittest import mock

import torch
from torch import nn

from ilm_compile import compile as front_door
from ilm_compile.passes.standard import settle_kernels
from ilm_compile.program.copy import copy_program
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from tests.support.promote import promoted_float32
from tests.support.world import World, WorldError


class CompiledWorld:
    """Runs functions as `World` does, on ranks that have a model compiled for a plan.

    make: a module-level function; `make(*key)` returns the model, once per key. promoted: all is
    done in float64 (see `promoted_float32`).
    """

    def __init__(
        self, size: int, make: Callable[..., nn.Module], *, promoted: bool = False
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.warm"])
        self._pipe, theirs = context.Pipe()
        # Not a daemon: those may have no children.
        life = (theirs, size, _name(make), promoted)
        self._process = context.Process(target=_compile_and_run, args=life)
        self._process.start()
        theirs.close()

    def __enter__(self) -> CompiledWorld:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.join(timeout=30)
        self._process.kill()

    def run(
        self,
        function: Callable[..., Any],
        key: tuple[Any, ...],
        plan: dict[str, Any],
        *args: Any,
        example_inputs: Any,
        dp: int = 1,
    ) -> list[Any]:
        """The results of `function(rank, model, *args)` by rank, with the model of `key`.

        The function calls `parallelize` with the same plan and inputs. Any other model or plan
        is an error.
        """
        self._pipe.send((_name(function), key, plan, args, example_inputs, dp))
        try:
            succeeded, answer = self._pipe.recv()
        except EOFError as error:
            raise WorldError("the process that compiles died") from error
        if not succeeded:
            raise WorldError(answer)
        results: list[Any] = answer
        return results


def _name(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__


def _find(name: tuple[str, str]) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(importlib.import_module(name[0]), name[1])
    return found


_shared: nn.Module  # the model that a rank is forked with


def _call(rank: int, function: tuple[str, str], *args: Any) -> Any:
    return _find(function)(rank, _shared, *args)


def _compile_and_run(pipe: Connection, size: int, make: tuple[str, str], promoted: bool) -> None:
    """The life of the compiler: answer requests until the pipe closes."""
    global _shared
    torch.set_num_threads(1)
    models: dict[tuple[Any, ...], nn.Module] = {}
    with promoted_float32() if promoted else nullcontext(), traced_once():
        while True:
            try:
                function, key, keywords, args, inputs, dp = pipe.recv()
            except EOFError:
                return
            try:
                if key not in models:
                    models[key] = _find(make)(*key)
                _shared = models[key]
                plan = settle_kernels(front_door.make_plan(None, **keywords), torch.device("cpu"))
                with _partitioned(_shared, plan, dp, inputs), World(size, method="fork") as world:
                    answer = (True, world.run(_call, function, *args))
            except BaseException:
                answer = (False, traceback.format_exc())
            pipe.send_bytes(pickle.dumps(answer))


@contextmanager
def traced_once() -> Iterator[None]:
    """Let `partition` trace a model once for all plans."""
    traced: dict[int, tuple[Any, Program]] = {}
    trace = front_door.trace

    def remembered(model: nn.Module, **keywords: Any) -> Program:
        plan = keywords.pop("plan")
        if id(model) not in traced:
            traced[id(model)] = (keywords, trace(model, **keywords))
        assert traced[id(model)][0] == keywords
        return replace(copy_program(traced[id(model)][1]), plan=plan)

    with mock.patch.object(front_door, "trace", remembered):
        yield


@contextmanager
def _partitioned(model: nn.Module, plan: Plan, dp: int, inputs: Any) -> Iterator[None]:
    """Let `parallelize` find the program of this very model, plan, dp and inputs."""
    program = front_door.partition(model, plan=plan, dp=dp, example_inputs=inputs)

    def found(other: nn.Module, **keywords: Any) -> Program:
        assert other is model
        assert keywords == {"plan": plan, "dp": dp, "example_inputs": inputs}
        return program

    with mock.patch.object(front_door, "partition", found):
        yield

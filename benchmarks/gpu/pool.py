"""Work that mostly compiles, in many processes: they share the GPU and the caches on disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.pool import Pool
from typing import TypeVar
from unittest import mock

import torch

from benchmarks.gpu.failure import Deadline

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

MAX_PROCESSES = 14  # of a few GB of GPU memory each


def run_all(
    function: Callable[[TaskT], ResultT],
    tasks: Sequence[TaskT],
    device: torch.device,
    deadline: Deadline,
    num_processes: int | None = None,
) -> Iterator[ResultT]:
    """The results as they come, in any order, until all are there or the deadline has passed.

    In this process on the CPU, unless a number is given. function: of a module, must not raise. A
    process that dies takes its task's result with it; the others go on.
    """
    if num_processes is None and device.type == "cpu":
        yield from map(function, tasks)
        return
    count = num_processes or min(MAX_PROCESSES, os.cpu_count() or 1)
    with _pool(min(count, len(tasks))) as pool:
        results = pool.imap_unordered(function, tasks)
        for _ in tasks:
            try:
                yield results.next(timeout=deadline.left)
            except multiprocessing.TimeoutError:
                return


def compile_ahead(
    function: Callable[[TaskT], object],
    tasks: Sequence[TaskT],
    device: torch.device,
    seconds: float,
) -> None:
    """Fill torch.compile's and Triton's caches on disk, many processes at a time; on CUDA only.

    function: what fails in it fails again where it is recorded.
    """
    if device.type == "cuda":
        for _ in run_all(partial(_quietly, function), tasks, device, Deadline(seconds)):
            pass


def forget_compiled(device: torch.device) -> None:
    """So that what is compiled next is for its own sizes, and not left uncompiled as one too many.

    What is on disk stays there.
    """
    if device.type == "cuda":
        torch.compiler.reset()


def _quietly(function: Callable[[TaskT], object], task: TaskT) -> None:
    with suppress(Exception):
        function(task)


def _pool(count: int) -> Pool:
    with mock.patch.dict(os.environ, {"TORCHINDUCTOR_COMPILE_THREADS": "1"}):
        return multiprocessing.get_context("spawn").Pool(count, initializer=_start)


def _start() -> None:
    torch.set_num_threads(1)

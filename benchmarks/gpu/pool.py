"""Work that mostly compiles, in many processes: they share the GPU and the caches on disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")

MAX_PROCESSES = 14  # of a few GB of GPU memory each


def run_all(
    function: Callable[[TaskT], ResultT],
    tasks: Sequence[TaskT],
    device: torch.device,
    num_processes: int | None = None,
) -> Iterator[ResultT]:
    """The results as they come, in any order; in this process on the CPU, unless a number is given.

    function: of a module, must not raise. Leaving the iterator early ends the processes.
    """
    if num_processes is None and device.type == "cpu":
        yield from map(function, tasks)
        return
    count = num_processes or min(MAX_PROCESSES, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(count, len(tasks)), initializer=_start) as pool:
        yield from pool.imap_unordered(function, tasks)


def _start() -> None:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are as many as the cores

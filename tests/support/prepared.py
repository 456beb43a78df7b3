"""Ranks that share what one process has prepared: forked from it when it is done.

Most of what a small case costs is tracing and compiling, and every rank would do the same. That
process keeps what it has traced for the next case. It has no other threads and no process group,
so nothing is held by a thread that the fork leaves behind.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from tests.support.world import World, WorldError, new_store, torchrun_environment


class Prepared:
    """One process that prepares call after call, and the ranks of each, which are forked from it.

    A call that fails or runs out of time ends the process; the next call starts a new one.
    """

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Prepared:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(
        self,
        prepare: Callable[..., object],
        function: Callable[..., Any],
        size: int,
        *args: Any,
        timeout: float = 120,
    ) -> list[Any]:
        """The results of `function(rank, *args)` of `size` ranks, after ``prepare(size, *args)``.

        timeout: in seconds, of each of the two. Raises `WorldError` with the traceback of what
        failed.
        """
        pipe = self._pipe or self._start()
        store = new_store()
        try:
            pipe.send((store.port, prepare, function, size, args, timeout))
            if not pipe.poll(2 * timeout):
                raise WorldError(f"{function.__qualname__}: no answer within {2 * timeout:g} s")
            succeeded, answer = pipe.recv()
            if not succeeded:
                raise WorldError(answer)
        except (EOFError, OSError) as error:
            self.close()
            name = function.__qualname__
            raise WorldError(f"the process that prepares {name} died") from error
        except BaseException:
            self.close()
            raise
        results: list[Any] = answer
        return results

    def close(self) -> None:
        """End the process."""
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.support.warm"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()
        return self._pipe


def _prepare_and_run(
    rank: int, prepare: Callable[..., object], function: Callable[..., Any], size: int, *args: Any
) -> Any:
    torch.manual_seed(0)
    prepare(size, *args)
    return function(rank, *args)


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # or the first bar starts a thread
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, _answer(*call)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _answer(
    port: int,
    prepare: Callable[..., object],
    function: Callable[..., Any],
    size: int,
    args: tuple[Any, ...],
    timeout: float,
) -> list[Any]:
    os.environ.update(torchrun_environment(0, size, port))
    torch.manual_seed(0)
    prepare(size, *args)
    if len(os.listdir("/proc/self/task")) == 1:
        with World(size, method="fork", port=port) as world:
            return world.run(function, *args, timeout=timeout)
    if not torch.backends.cuda.is_built():
        raise WorldError(f"{prepare.__qualname__} left threads running; ranks cannot be forked")
    # A backward in a build for CUDA starts some, even without a device.
    with World(size) as world:
        given = (prepare, function, size, *args)
        return world.run(_prepare_and_run, *given, timeout=2 * timeout)

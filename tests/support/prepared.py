"""Ranks that share what one process has prepared: forked from it when it is done.

Most of what a small case costs is tracing and compiling, and every rank would do the same. That
process has no other threads and no process group, so nothing is held by a thread that the fork
leaves behind.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
from tqdm import tqdm

from tests.support.world import World, WorldError, new_store, torchrun_environment


def run_prepared(
    prepare: Callable[..., object],
    function: Callable[..., Any],
    size: int,
    *args: Any,
    timeout: float = 120,
) -> list[Any]:
    """The results of `function(rank, *args)` of `size` ranks, after one ``prepare(size, *args)``.

    timeout: in seconds, of each of the two. Raises `WorldError` with the traceback of what failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.warm"])
    ours, theirs = context.Pipe()
    store = new_store()
    call = (prepare, function, size, args, timeout)
    process = context.Process(target=_serve, args=(theirs, store.port, *call))
    process.start()
    theirs.close()
    try:
        if not ours.poll(2 * timeout):
            raise WorldError(f"{function.__qualname__}: no answer within {2 * timeout:g} s")
        succeeded, answer = ours.recv()
    except EOFError as error:
        raise WorldError(f"the process that prepares {function.__qualname__} died") from error
    finally:
        process.kill()
        process.join()
    if not succeeded:
        raise WorldError(answer)
    results: list[Any] = answer
    return results


def _prepare_and_run(
    rank: int, prepare: Callable[..., object], function: Callable[..., Any], size: int, *args: Any
) -> Any:
    torch.manual_seed(0)
    prepare(size, *args)
    return function(rank, *args)


def _serve(
    pipe: Connection,
    port: int,
    prepare: Callable[..., object],
    function: Callable[..., Any],
    size: int,
    args: tuple[Any, ...],
    timeout: float,
) -> None:
    os.environ.update(torchrun_environment(0, size, port))
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # or the first bar starts a thread
    try:
        torch.manual_seed(0)
        prepare(size, *args)
        if len(os.listdir("/proc/self/task")) > 1:
            if not torch.backends.cuda.is_built():
                name = prepare.__qualname__
                raise WorldError(f"{name} left threads running; ranks cannot be forked")
            # A backward in a build for CUDA starts some, even without a device.
            with World(size) as world:
                given = (prepare, function, size, *args)
                pipe.send((True, world.run(_prepare_and_run, *given, timeout=2 * timeout)))
            return
        gc.freeze()
        with World(size, method="fork", port=port) as world:
            pipe.send((True, world.run(function, *args, timeout=timeout)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))

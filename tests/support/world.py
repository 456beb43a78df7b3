"""Worlds of real processes for tests: gloo over loopback, started the way torchrun starts them.

A `World` keeps its processes alive between calls, so a test module pays for the start once. A
call that fails or runs out of time ends all processes (the survivors may be stuck inside a
collective); the next call starts new ones. Ranks are forked from one server that has imported
`tests.support.warm` and does nothing else, so no rank pays for the imports of torch again.
"""

import importlib
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=60)


class WorldError(RuntimeError):
    """A rank raised, died, or did not answer in time. The message holds the rank's traceback."""


class World:
    """`size` processes that share a gloo process group and run functions on request.

    function: a module-level function of an importable module, called as `function(rank, *args)`.
    Arguments and results travel by pickle. Every call starts from seed 0 and float32 defaults.
    debug: set TORCH_DISTRIBUTED_DEBUG=DETAIL, which checks that all ranks call the same collective.
    method: "fork" starts ranks from this very process, with what it holds in memory; `port` is then
    that of a store in another process, for a store has a thread.
    """

    def __init__(
        self, size: int, *, debug: bool = False, method: str = "forkserver", port: int | None = None
    ) -> None:
        self.size = size
        self._debug = debug
        self._port = port
        self._context = multiprocessing.get_context(method)
        self._store: dist.TCPStore | None = None
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
        """The results of `function(rank, *args)` by rank; `timeout` in seconds for the call."""
        request = pickle.dumps((function.__module__, function.__qualname__, args))
        if not self._processes:
            self._start()
        try:
            for rank, pipe in enumerate(self._pipes):
                self._send(rank, pipe, request)
            return self._gather(function.__qualname__, time.monotonic() + timeout, timeout)
        except BaseException:
            self._kill()
            raise

    def close(self) -> None:
        """Ask the processes to leave, and end those that do not."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
        self._kill()

    def _start(self) -> None:
        if self._port is None:
            self._store = new_store()
        self._context.set_forkserver_preload(["tests.support.warm"])
        for rank in range(self.size):
            ours, theirs = self._context.Pipe()
            port = self._store.port if self._store else self._port
            environment = torchrun_environment(rank, self.size, port, self._debug)
            # A forked rank holds copies of our ends, which keep it from seeing that we closed them.
            forked = self._context.get_start_method() == "fork"
            inherited = [*self._pipes, ours] if forked else []
            process = self._context.Process(
                target=_serve, args=(theirs, environment, inherited), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _send(self, rank: int, pipe: Connection, request: bytes) -> None:
        try:
            pipe.send_bytes(request)
        except OSError as error:
            raise WorldError(self._death(rank, "between two calls")) from error

    def _gather(self, name: str, deadline: float, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.size:
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = sorted(set(range(self.size)) - set(results))
                raise WorldError(f"{name}: ranks {missing} gave no answer within {timeout:g} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                results[rank] = self._receive(rank, name)
        return [results[rank] for rank in range(self.size)]

    def _receive(self, rank: int, name: str) -> Any:
        try:
            succeeded, answer = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError) as error:
            raise WorldError(self._death(rank, f"while running {name}")) from error
        if not succeeded:
            raise WorldError(f"rank {rank} of {self.size} failed while running {name}:\n{answer}")
        return answer

    def _death(self, rank: int, when: str) -> str:
        self._processes[rank].join(timeout=5)
        code = self._processes[rank].exitcode
        return f"rank {rank} of {self.size} died with exit code {code} {when}"

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes, self._store = [], [], None


def run_world(
    function: Callable[..., Any], size: int, *args: Any, timeout: float = 120, debug: bool = False
) -> list[Any]:
    """One call in a world of its own: the results of `function(rank, *args)` by rank."""
    with World(size, debug=debug) as world:
        return world.run(function, *args, timeout=timeout)


def new_store() -> dist.TCPStore:
    """A store like that of torchrun's agent.

    Its port is chosen by the system and bound at once: no other process can take it in between.
    """
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def torchrun_environment(
    rank: int, size: int, port: int | None, debug: bool = False
) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # rank 0 joins the parent's store instead of opening one
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL" if debug else "OFF",
    }


def _serve(pipe: Connection, environment: dict[str, str], inherited: list[Connection]) -> None:
    """The life of one rank: join the group, then answer requests until the pipe closes."""
    for end in inherited:
        end.close()
    os.environ.update(environment)
    dist.set_debug_level_from_env()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=GROUP_TIMEOUT)
    rank = dist.get_rank()
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            break
        pipe.send_bytes(_answer(rank, request))
    dist.destroy_process_group()


def _answer(rank: int, request: bytes) -> bytes:
    try:
        module, qualname, args = pickle.loads(request)
        function = getattr(importlib.import_module(module), qualname)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        return pickle.dumps((True, function(rank, *args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))

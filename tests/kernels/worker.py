"""Processes of their own for Triton: one that interprets kernels, one that compiles them.

TRITON_INTERPRET is read when a kernel's module is imported, and the interpreter replaces parts of
triton.language for good, so the two cannot share a process, nor with tests that run on a GPU. Each
pytest process starts at most one of either, at the first test that needs it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

TIMEOUT_S = 120


class Worker:
    """A process that calls functions by name; arguments and results travel by pickle.

    A call that raises, raises RuntimeError here with the traceback of there. What the process
    allocates without filling it is NaN, so that a kernel which forgets an element is found.
    """

    def __init__(self, **environment: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.kill()

    def call(self, target: str, *args: Any) -> Any:
        """The result of `module:function` there."""
        self._pipe.send_bytes(pickle.dumps((target, args)))
        if not self._pipe.poll(TIMEOUT_S):
            self._process.kill()
            raise RuntimeError(f"{target}: no answer within {TIMEOUT_S} s")
        try:
            succeeded, answer = pickle.loads(self._pipe.recv_bytes())
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{target}: died, exit code {self._process.exitcode}") from None
        if not succeeded:
            raise RuntimeError(f"{target} failed:\n{answer}")
        return answer


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(environment, TRITON_CACHE_DIR=cache)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
        if environment["TRITON_INTERPRET"] == "1":
            _loop_with_new_numpy()
        while True:
            try:
                target, args = pickle.loads(pipe.recv_bytes())
            except EOFError:
                break
            pipe.send_bytes(_answer(target, args))
    os._exit(0)  # taking torch and triton down in order takes seconds


def _loop_with_new_numpy() -> None:
    """Let a kernel loop up to an argument, which triton 3.6 holds as an array of one number.

    numpy has made no int of such an array since 2.4. Later releases of triton do the same.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


def _answer(target: str, args: tuple[Any, ...]) -> bytes:
    try:
        module, name = target.split(":")
        return pickle.dumps((True, getattr(importlib.import_module(module), name)(*args)))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))

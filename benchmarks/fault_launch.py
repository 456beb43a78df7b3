"""Starts a small job as torchrun does, by forking: its processes need not import torch again.

The launcher is a process of its own that runs torchrun's agent. What it and the ranks print goes to
one file, the exit codes of failed ranks to another.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from benchmarks.common import launch_config

LOG, CODES, RANKS = "log.txt", "codes.json", "ranks"
_PR_SET_PDEATHSIG = 1


def start(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    num_processes: int,
    max_restarts: int,
    folder: Path,
) -> int:
    """Run ``function(*arguments)`` in every rank; returns the launcher's process id at once.

    The launcher leads a process group of its own and ends with torchrun's exit codes: 0, or 1.
    """
    (folder / RANKS).mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) != 0:
        return child
    code = 1
    try:
        os.setsid()
        _redirect(folder / LOG)
        code = _run_agent(function, arguments, num_processes, max_restarts, folder)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def pids(folder: Path) -> list[int]:
    """The processes of the job's ranks, dead ones included."""
    return [int(path.read_text()) for path in (folder / RANKS).glob("[0-9]*")]


def codes(folder: Path) -> dict[str, int]:
    """The exit codes of the ranks that failed, as torchrun reports them."""
    path = folder / CODES
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _redirect(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _run_agent(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    num_processes: int,
    max_restarts: int,
    folder: Path,
) -> int:
    config = launch_config(
        num_processes, start_method="fork", monitor_interval=0.1, max_restarts=max_restarts
    )
    try:
        elastic_launch(config, _rank)(function, arguments, folder)
    except ChildFailedError as error:
        found = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        (folder / CODES).write_text(json.dumps(found))
        return 1
    except BaseException as error:  # SignalException, as torchrun
        print(f"launcher: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _rank(function: Callable[..., None], arguments: tuple[Any, ...], folder: Path) -> None:
    # Here torch asks for SIGINT when the launcher dies; torchrun's workers get nothing.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    assert threading.active_count() == 1
    (folder / RANKS / os.environ["RANK"]).write_text(str(os.getpid()))
    function(*arguments)

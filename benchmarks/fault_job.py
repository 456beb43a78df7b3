"""What runs in every rank of a faulty job: a training from a config, and one fault injected.

A fault is injected at a counted moment, so that a seed gives the same moment again: the n-th action
of a step, the n-th disk operation of a save, the n-th file of a load.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ilm_compile.cli import main
from ilm_compile.runtime import Parallel
from ilm_compile.runtime.checkpoint import manager, save
from ilm_compile.runtime.checkpoint.training_state import TrainingState
from ilm_compile.runtime.guard.activity import ACTIVITY, Activity
from ilm_compile.training import agreement

INJECTED = "injected"
FILLER = "filler"


@dataclass(frozen=True, slots=True)
class Fault:
    """action: a key of `ACTIONS`, done by `rank` at `moment` (a key of `MOMENTS`), the `at`-th time
    it comes from training step `step` on. moment "start" is before anything else.
    """

    action: str
    moment: str = "start"
    rank: int = 0
    step: int = 1
    at: int = 1


def run(config: Path, options: list[str], fault: Fault | None, folder: Path) -> None:
    """Train from the config; `options` for the command line. Ends the process."""
    torch.set_num_threads(1)
    launcher = os.getppid()
    arguments = ["train", "--config", str(config), *options]
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if fault is not None and is_first and fault.rank == int(os.environ["RANK"]):
        act = ACTIONS[fault.action]

        def inject() -> None:
            (folder / INJECTED).write_text(repr(time.time()))
            act(arguments)

        MOMENTS[fault.moment](fault, inject)
    code = main(arguments)
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if code or os.getppid() != launcher:  # torch's wrapper would wait for one that is dead
        os._exit(code)


# when


class _Countdown:
    def __init__(self, at: int, act: Callable[[], None]) -> None:
        self._left, self._act = at, act

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()


def _in_step(fault: Fault, act: Callable[[], None]) -> None:
    """At an action of the executor, the gradient norm, the optimizer, ..."""
    count, original = _Countdown(fault.at, act), Activity.do

    def do(activity: Activity, action: str) -> None:
        original(activity, action)
        step = re.fullmatch(r"step (\d+)", activity.phase)
        if step and int(step[1]) >= fault.step:
            count()

    _replace(Activity, "do", do)


def _in_save(fault: Fault, act: Callable[[], None]) -> None:
    """At something that a save does to the disk, in whichever thread."""
    countdown = _Countdown(fault.at, act)

    def count() -> None:
        if not ACTIVITY.phase.startswith("start"):  # where a file is written on trial
            countdown()

    _before(save.HashingFile, "write", count)
    for name in ("rename", "mkdir", "fsync", "unlink"):
        _before(os, name, count)


def _in_load(fault: Fault, act: Callable[[], None]) -> None:
    """At the hashing of a file, or at the reading of the tensors."""
    count = _Countdown(fault.at, act)
    _before(manager, "check_file", count)
    _before(TrainingState, "restore", count)


def _before(owner: Any, name: str, act: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        act()
        return original(*arguments, **keywords)

    _replace(owner, name, wrapped)


def _replace(owner: Any, name: str, value: object) -> None:
    setattr(owner, name, value)


MOMENTS: dict[str, Callable[[Fault, Callable[[], None]], None]] = {
    "start": lambda fault, act: act(),
    "step": _in_step,
    "save": _in_save,
    "load": _in_load,
}

# what


def _full_disk(arguments: list[str]) -> None:
    """From now on every write of a checkpoint fails, as on a full disk."""

    def write(file: object, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _replace(save.HashingFile, "write", write)


def _fill_disk(arguments: list[str]) -> None:
    """Leave no byte free where the checkpoints go."""
    folder = next(text for text in arguments if text.startswith("ckpt.folder=local:"))
    with contextlib.suppress(OSError), Path(folder.partition(":")[2], FILLER).open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()


def _nan(arguments: list[str]) -> None:
    """A gradient of this rank is NaN in the step under way, once."""
    original = Parallel.grad_norm

    def spoiled(parallel: Parallel) -> Tensor:
        _replace(Parallel, "grad_norm", original)
        gradient: Any = next(p.grad for _, p in parallel.named_parameters() if p.grad is not None)
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        local.view(-1)[0] = float("nan")
        return original(parallel)

    _replace(Parallel, "grad_norm", spoiled)


def _kill_launcher(arguments: list[str]) -> None:
    """In a step that takes so long that the training is not over before anybody looks."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(2)


def _hold_the_lock(arguments: list[str]) -> None:
    """Native code that never returns and never lets another thread of Python run."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def _other_code(arguments: list[str]) -> None:
    _replace(agreement, "code_digest", lambda: b"another")


ACTIONS: dict[str, Callable[[list[str]], object]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "raise": lambda _: 1 / 0,
    "terminate rank": lambda _: os.kill(os.getpid(), signal.SIGTERM),
    "terminate launcher": lambda _: os.kill(os.getppid(), signal.SIGTERM),
    "kill launcher": _kill_launcher,
    "sleep": lambda _: time.sleep(10_000),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "hold the lock": _hold_the_lock,
    "full disk": _full_disk,
    "fill disk": _fill_disk,
    "nan": _nan,
    "other config": lambda arguments: arguments.extend(["--set", "optimizer.lr=0.5"]),
    "other code": _other_code,
}

"""The faults of the table: how each is drawn from a seed, and what must come of it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from benchmarks.fault_job import FILLER, Fault

STEPS, EVERY, HALF = 10, 2, 6
NUM_PROCESSES = 2
TIMEOUT_S, HANG_S = 60.0, 6.0
_ACTIONS_A_STEP = 12  # about, on either rank
_SAVE_OPERATIONS = 24  # about, of the saves of a run on one rank
RUNS, DATA, DISK = "runs", "data", "disk"


@dataclass(frozen=True, slots=True)
class Kind:
    """A row of the table.

    draw: the fault that is injected into the first run, if any. from_half: that run goes on with
    one that was stopped after step `HALF`; damage: what is done to its files before. options: of
    the command line of the first run. repair: what a person does before the run is started again.
    survives: the first run itself must end well. num_processes, max_restarts: of the first run.
    may_pass: the run may end well if its curve is right: what was damaged was never read.
    skips: steps that it leaves out, so that its curve is not the undisturbed one from there on.
    """

    name: str
    draw: Callable[[Random], Fault] | None = None
    from_half: bool = False
    damage: Callable[[Path, Random], None] | None = None
    options: tuple[str, ...] = ()
    disk: bool = False
    repair: Callable[[Path], None] | None = None
    survives: bool = False
    num_processes: int = NUM_PROCESSES
    max_restarts: int = 0
    may_pass: bool = False
    skips: int = 0


def _in_step(action: str) -> Callable[[Random], Fault]:
    def draw(random: Random) -> Fault:
        return Fault(
            action,
            "step",
            rank=random.randrange(NUM_PROCESSES),
            step=random.randint(3, STEPS - 2),
            at=random.randint(1, _ACTIONS_A_STEP),
        )

    return draw


def _counted(action: str, moment: str, most: int) -> Callable[[Random], Fault]:
    return lambda random: Fault(
        action, moment, rank=random.randrange(NUM_PROCESSES), at=random.randint(1, most)
    )


def _in_save(action: str) -> Callable[[Random], Fault]:
    return _counted(action, "save", _SAVE_OPERATIONS)


def _in_load(action: str) -> Callable[[Random], Fault]:
    return _counted(action, "load", 2)


def _at_start(action: str) -> Callable[[Random], Fault]:
    return lambda random: Fault(action, rank=random.randrange(1, NUM_PROCESSES))


def checkpoint_files(folder: Path, step: int) -> list[Path]:
    """The files of one checkpoint of a run in `folder`."""
    return sorted((folder / RUNS / "job" / "checkpoints" / f"step-{step:08d}").iterdir())


def _truncate(path: Path, random: Random) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def _flip(path: Path, random: Random) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def _newest(change: Callable[[Path, Random], None]) -> Callable[[Path, Random], None]:
    return lambda folder, random: change(random.choice(checkpoint_files(folder, HALF)), random)


def _tokens(change: Callable[[Path, Random], None]) -> Callable[[Path, Random], None]:
    return lambda folder, random: change(folder / DATA / "a.bin", random)


def _new_data(folder: Path) -> None:
    shutil.copytree(folder.parent / DATA, folder / DATA, dirs_exist_ok=True)


def _free_disk(folder: Path) -> None:
    (folder / DISK / FILLER).unlink(missing_ok=True)


def mount_disk(folder: Path) -> bool:
    """A file system of 3 MiB at `folder`, which only root may make."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)]
    return subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode == 0


def unmount_disk(folder: Path) -> None:
    """Undo `mount_disk`."""
    subprocess.run(["umount", str(folder)], check=True)


KINDS: tuple[Kind, ...] = (
    Kind("kill -9 of a rank in a step", _in_step("kill")),
    Kind("kill -9 of a rank, torchrun restarts", _in_step("kill"), survives=True, max_restarts=1),
    Kind("kill -9 of a rank in a save", _in_save("kill")),
    Kind("kill -9 of a rank in a load", _in_load("kill"), from_half=True),
    Kind("kill -9 of the launcher", _in_step("kill launcher")),
    Kind("exception on one rank", _in_step("raise")),
    Kind("SIGTERM to the launcher", _in_step("terminate launcher")),
    Kind("SIGTERM to one rank", _in_step("terminate rank")),
    Kind("full disk (tmpfs)", _in_step("fill disk"), disk=True, repair=_free_disk),
    Kind("full disk (ENOSPC from write)", _in_step("full disk")),
    Kind("checkpoint file truncated", from_half=True, damage=_newest(_truncate), survives=True),
    Kind("checkpoint bit flipped", from_half=True, damage=_newest(_flip), survives=True),
    Kind("data file truncated", damage=_tokens(_truncate), repair=_new_data),
    Kind("data bit flipped", damage=_tokens(_flip), repair=_new_data, may_pass=True),
    Kind("hang: endless sleep in a step", _in_step("sleep")),
    Kind("hang: SIGSTOP in a step", _in_step("stop")),
    Kind("hang: interpreter lock held", _in_step("hold the lock")),
    Kind("hang: endless sleep in a save", _in_save("sleep"), options=("train.timeout_s=20",)),
    Kind("NaN gradient on one rank", _in_step("nan"), survives=True, skips=1),
    Kind("wrong world size", num_processes=3),
    Kind("a rank that never comes", _at_start("sleep"), options=("train.timeout_s=5",)),
    Kind("other config on one rank", _at_start("other config")),
    Kind("other code on one rank", _at_start("other code")),
)

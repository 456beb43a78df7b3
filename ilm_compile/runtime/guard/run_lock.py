"""One job at a time in a run's folder: a file that names its owner, and beats while it lives.

The owner is rank 0 of the job. On its own host its process tells whether it lives; from another
host only the beat does, which is looked at twice rather than compared with a clock. Hard links make
the file, since they are atomic on shared file systems too.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from ilm_compile.errors import IlmCompileError
from ilm_compile.files import read_as, write_text
from ilm_compile.runtime.guard.ending import ExitCode

LOGGER = logging.getLogger("ilm_compile.guard")
LOCK_FILE = "running.json"
BEAT_S = 2.0
PATIENCE = 4  # beats that may be missed


class RunLockError(IlmCompileError):
    """Another job is at work in the folder."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a lock. began: when its process did, in the host's own count, as numbers of
    processes are used again. beats: grows while it lives."""

    host: str
    pid: int
    began: str
    token: str
    beats: int = 0

    @classmethod
    def here(cls) -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(socket.gethostname(), pid, _began(pid), os.urandom(8).hex())

    def is_gone(self) -> bool:
        """Whether it was a process of this host that is no more."""
        return self.host == socket.gethostname() and _began(self.pid) != self.began


class RunLock:
    """Holds `folder` from `take` to `release`, as a context manager or by hand.

    beat_s: seconds between beats. lose: called if another job has taken the folder all the same,
    as it may when this one was asleep; it ends the process at once, which must not save there.
    """

    def __init__(
        self, folder: Path, *, beat_s: float = BEAT_S, lose: Callable[[], object] | None = None
    ) -> None:
        self._path = folder / LOCK_FILE
        self._beat_s = beat_s
        self._lose = lose or (lambda: os._exit(ExitCode.ERROR))
        self._owner = Owner.here()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the folder, from a dead owner too, and begin to beat.

        Returns at once unless there is an owner on another host, whose beat is waited for, or one
        that died. Raises `RunLockError` naming an owner that lives.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._make():
            other = self._read()
            if other is not None and not other.is_gone() and self._beats(other):
                raise RunLockError(
                    f"start: {self._path.parent} belongs to a job that runs: process {other.pid} "
                    f"on {other.host}; wait for its end, stop it, or choose another job_name"
                )
            self._take_away(other)
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop beating, and leave the folder to the next job."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._is_own():
            self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _make(self) -> bool:
        """Make the file; return whether there was none."""
        partial = self._path.with_name(f".{LOCK_FILE}.{self._owner.token}")
        try:
            partial.write_text(json.dumps(asdict(self._owner)))
            os.link(partial, self._path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return self._make_without_links()
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _make_without_links(self) -> bool:
        try:
            with self._path.open("x") as file:
                file.write(json.dumps(asdict(self._owner)))
        except FileExistsError:
            return False
        return True

    def _read(self) -> Owner | None:
        """The owner; None if the file is gone or cannot be understood."""
        return read_as(Owner, self._path)

    def _beats(self, other: Owner) -> bool:
        """Whether the owner, who is not known to be gone, still beats."""
        if other.host == socket.gethostname():
            return True
        deadline = time.monotonic() + PATIENCE * self._beat_s
        while time.monotonic() < deadline:
            time.sleep(self._beat_s / 4)
            if self._read() != other:
                return True
        return False

    def _take_away(self, other: Owner | None) -> None:
        """Remove the file of a dead owner, unless another job was faster."""
        grave = self._path.with_name(f".{LOCK_FILE}.{self._owner.token}")
        with suppress(FileNotFoundError):
            self._path.rename(grave)
            taken = read_as(Owner, grave)
            if taken != other:  # it is another's by now: put it back
                with suppress(FileExistsError):
                    os.link(grave, self._path)
            grave.unlink()
        if other is not None:
            LOGGER.warning("%s was left by process %d on %s", self._path, other.pid, other.host)

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            if not self._is_own():
                LOGGER.error("%s was taken by another job; this one stops", self._path.parent)
                self._lose()
                return
            self._owner = replace(self._owner, beats=self._owner.beats + 1)
            with suppress(OSError):  # a full disk is not this file's to report
                write_text(self._path, json.dumps(asdict(self._owner)))

    def _is_own(self) -> bool:
        found = self._read()
        return found is None or found.token == self._owner.token


def _began(pid: int) -> str:
    """When a process began, in the host's own count; "" if there is none, or one that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "" if Path("/proc/self/stat").exists() or not _answers(pid) else "some time ago"
    return "" if state in "ZX" else fields[18]


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True

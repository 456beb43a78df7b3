"""Kills a process at the n-th thing that a save does to the disk, for every n."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ilm_compile.runtime.checkpoint import save
from tests.support.checkpoint_job import Job, same

NAME = "step-{:08d}"


class Fuse:
    """Kills this process, as `kill -9` does, at disk operation number `at` from now on.

    Half of a write that it falls on is done. Of the writes, which are alike, every fourth counts.
    """

    def __init__(self, at: int) -> None:
        self._left = at
        self._writes = 0
        self._wrap(save.HashingFile, "write", half=True)
        for function in ("rename", "mkdir", "fsync", "unlink", "rmdir"):
            self._wrap(os, function)

    def _wrap(self, owner: Any, name: str, *, half: bool = False) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def burning(*arguments: Any, **keywords: Any) -> Any:
            self._writes += half
            if half and self._writes % 4 != 1:
                return original(*arguments, **keywords)
            self._left -= 1
            if self._left == 0:
                if half:
                    file, data = arguments
                    original(file, data[: len(data) // 2])
                    file._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        setattr(owner, name, burning)


def resumed_after_each_crash(folder: str) -> list[int]:
    """The step that a resume finds after a kill at the first, second, ... operation of a save.

    Step 1 is complete before, step 2 is being saved and shall replace it (keep_last=1). Checks that
    what is resumed is whole, and that the next save works. Ends with the save that nothing killed.
    """
    start = Job(f"{folder}/start", keep_last=1)
    expected = {}
    for step in (1, 2):
        start.step()
        expected[step] = start.weights()
        if step == 1:
            start.manager.save(1, wait=True)
    found = []
    for at in range(1, 1000):
        place = Path(folder, str(at))
        shutil.copytree(f"{folder}/start", place)
        survived = _save_until_killed(place, at)
        job = Job(place, seed=4, keep_last=1)
        step = job.manager.resume()
        assert step is not None, f"nothing left after operation {at}"
        assert same(job.weights(), expected[step]), f"mixed weights after operation {at}"
        assert job.counter.value == step
        job.manager.save(3, wait=True)
        job.manager.close()
        assert [path.name for path in place.iterdir()] == [NAME.format(3)]
        found.append(step)
        shutil.rmtree(place)
        if survived:
            return found
    raise AssertionError("a save of more than 1000 operations")


def _save_until_killed(place: Path, at: int) -> bool:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            job = Job(place, keep_last=1)
            job.manager.resume()
            job.step()
            Fuse(at)
            job.manager.save(2, wait=True)
            job.manager.close()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"operation {at}: status {status}"
    return status == 0

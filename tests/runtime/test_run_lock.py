"""One job at a time in a folder: who lives keeps it, who is dead leaves it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ilm_compile.runtime.guard.run_lock import LOCK_FILE, Owner, RunLock, RunLockError

BEAT_S = 0.05


def left_by(folder: Path, owner: Owner) -> None:
    (folder / LOCK_FILE).write_text(json.dumps(asdict(owner)))


def test_a_folder_is_held_once_and_then_free_again(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLock(tmp_path), pytest.raises(RunLockError, match="wait for its end, stop it"):
            RunLock(tmp_path).take()
        assert list(tmp_path.iterdir()) == []


def test_what_a_dead_process_left_is_taken(tmp_path: Path) -> None:
    code = "from ilm_compile.runtime.guard.run_lock import RunLock; import os, pathlib\n"
    code += f"RunLock(pathlib.Path({str(tmp_path)!r})).take(); os._exit(0)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / LOCK_FILE).exists()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == Owner.here().pid


def test_a_number_that_is_another_process_s_by_now_is_no_owner(tmp_path: Path) -> None:
    left_by(tmp_path, replace(Owner.here(), began="long ago", token="other"))
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{}", "[1"])
def test_a_file_that_says_nothing_is_no_owner(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text(text)
    with RunLock(tmp_path):
        pass


def test_of_another_host_the_beat_tells(tmp_path: Path) -> None:
    other = replace(Owner.here(), host="elsewhere", token="other")
    left_by(tmp_path, other)
    ended = threading.Event()

    def beat() -> None:
        beats = 0
        while not ended.wait(BEAT_S):
            beats += 1
            left_by(tmp_path, replace(other, beats=beats))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(RunLockError, match="on elsewhere"):
        RunLock(tmp_path, beat_s=4 * BEAT_S).take()
    ended.set()
    thread.join()
    with RunLock(tmp_path, beat_s=BEAT_S):
        assert "elsewhere" not in (tmp_path / LOCK_FILE).read_text()


def test_an_owner_whose_folder_was_taken_stops_and_leaves_it_be(tmp_path: Path) -> None:
    lost = threading.Event()
    lock = RunLock(tmp_path, beat_s=BEAT_S, lose=lost.set)
    lock.take()
    left_by(tmp_path, replace(Owner.here(), token="other"))
    assert lost.wait(10)
    lock.release()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["token"] == "other"


def test_a_file_system_without_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("os.link", link)
    with RunLock(tmp_path), pytest.raises(RunLockError):
        RunLock(tmp_path).take()

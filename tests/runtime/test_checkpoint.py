"""The checkpoint manager in one process: when it saves, what stays, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from ilm_compile.runtime.checkpoint import CheckpointError, manager
from ilm_compile.runtime.checkpoint.retention import superseded
from tests.support.checkpoint_job import Job, same


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A local folder, and one of an object store."""
    if request.param == "local":
        yield f"local:{tmp_path / 'ckpt'}"
        return
    yield "memory://bucket/ckpt"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def steps_in(place: str) -> list[str]:
    if place.startswith("local:"):
        return sorted(path.name for path in Path(place.removeprefix("local:")).iterdir())
    found = fsspec.filesystem("memory").ls(place.removeprefix("memory:/"), detail=False)
    return sorted(name.rpartition("/")[2] for name in found)


def test_a_resumed_run_goes_on_as_the_saved_one(place: str) -> None:
    one = Job(place, every=3)
    one.train(1, 3)
    expected = [one.step() for _ in range(3)]
    two = Job(place, seed=4, lr=0.5)
    assert two.manager.resume() == 3
    assert two.counter.value == 3
    assert [two.step() for _ in range(3)] == expected


def test_there_is_nothing_to_resume_at_first(place: str) -> None:
    job = Job(place)
    before = job.weights()
    assert job.manager.resume() is None
    assert job.manager.latest() is None
    assert same(job.weights(), before)


def test_saves_when_due_and_keeps_what_the_policy_says(place: str) -> None:
    Job(place, every=2, keep_last=2, keep_every=4).train(1, 11)
    assert steps_in(place) == ["step-00000004", "step-00000008", "step-00000010"]


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "gone"),
    [
        ([], 1, 0, []),
        ([5], 1, 0, []),
        ([1, 2, 3], 1, 0, [1, 2]),
        ([3, 1, 2], 2, 0, [1]),
        ([10, 20, 30, 40], 1, 20, [10, 30]),
        ([0, 1, 2], 1, 2, [1]),
    ],
)
def test_what_is_superseded(
    steps: list[int], keep_last: int, keep_every: int, gone: list[int]
) -> None:
    assert superseded(steps, keep_last=keep_last, keep_every=keep_every) == gone


def test_only_sound_ones_count_and_no_more_are_asked_of_than_must() -> None:
    asked = []

    def is_sound(step: int) -> bool:
        asked.append(step)
        return step % 2 == 0

    gone = superseded(range(1, 8), keep_last=2, keep_every=0, is_sound=is_sound)
    assert (gone, asked) == ([1, 2, 3], [7, 6, 5, 4])


def test_random_numbers_go_on_where_they_were(place: str) -> None:
    job = Job(place)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    job.manager.save(1, wait=True)

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    expected = draw()
    draw()
    Job(place).manager.resume()
    assert draw() == expected


def test_a_checkpoint_says_what_it_is_for_people(tmp_path: Path) -> None:
    job = Job(tmp_path, config={"lr": 0.1})
    job.step()
    job.manager.save(7, wait=True)
    body = json.loads((tmp_path / "step-00000007" / "manifest.json").read_text())["body"]
    assert (body["step"], body["config"], body["plan"]["tp"]) == (7, {"lr": 0.1}, 1)
    assert body["tensors"]["model/blocks.0.gate_up"]["shape"] == [16, 6]
    assert body["tensors"]["optimizer/exp_avg/embed"]["dtype"] == "F64"
    assert "model/scale" in body["tensors"]


# Asynchronous


class Gate:
    """Holds the writer thread until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        write = manager.write_part

        def held(*arguments: Any) -> None:
            self.entered.set()
            assert self.opened.wait(30)
            if error is not None:
                raise error
            write(*arguments)

        monkeypatch.setattr(manager, "write_part", held)


def test_training_goes_on_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    job = Job(tmp_path)
    job.step()
    saved = job.weights()
    job.manager.save(1)
    assert gate.entered.wait(30)
    job.step()
    job.manager.after_step(2)
    assert job.manager.latest() is None
    gate.opened.set()
    job.manager.wait()
    assert job.manager.latest() == 1
    assert not same(saved, job.weights())
    other = Job(tmp_path, seed=4)
    other.manager.resume()
    assert same(other.weights(), saved)
    assert other.counter.value == 1


def test_a_save_is_complete_at_a_later_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.opened.set()
    job = Job(tmp_path)
    job.manager.save(1)
    deadline = time.monotonic() + 30
    step = 2
    while not (tmp_path / "step-00000001").exists() and time.monotonic() < deadline:
        job.manager.after_step(step)
        step += 1
    assert job.manager.latest() == 1


def test_an_error_of_the_thread_comes_with_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path)
    job.manager.save(1, wait=True)
    with monkeypatch.context() as patch:
        gate = Gate(patch, OSError(28, "No space left on device"))
        job.manager.save(2)
        assert gate.entered.wait(30)
        gate.opened.set()
        with pytest.raises(CheckpointError, match=r"step 2 .*not written.*No space left on device"):
            job.manager.wait()
    assert steps_in(f"local:{tmp_path}") == ["step-00000001"]
    job.manager.save(3, wait=True)
    assert job.manager.latest() == 3


def test_a_file_that_shrank_before_the_save_is_complete_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another node's disk has lost the end of a file."""
    write = manager.write_part

    def shrinking(storage: Any, working: str, *arguments: Any) -> None:
        write(storage, working, *arguments)
        cut(tmp_path / working / "rank-00000-000.safetensors")

    monkeypatch.setattr(manager, "write_part", shrinking)
    with pytest.raises(
        CheckpointError, match=r"rank-00000-000\.safetensors: wrote \d+ bytes, found"
    ):
        Job(tmp_path).manager.save(1, wait=True)
    assert not list(tmp_path.iterdir())


def test_one_save_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    job = Job(tmp_path)
    job.manager.save(1)
    threading.Timer(0.2, gate.opened.set).start()
    job.manager.save(2)
    assert (tmp_path / "step-00000001").exists()
    job.manager.close()
    assert (tmp_path / "step-00000002").exists()


def test_synchronous_is_complete_at_once(tmp_path: Path) -> None:
    Job(tmp_path, asynchronous=False).manager.save(1)
    assert steps_in(f"local:{tmp_path}") == ["step-00000001"]


def test_the_same_step_again_replaces_it(place: str) -> None:
    job = Job(place)
    job.manager.save(1, wait=True)
    job.step()
    job.manager.save(1, wait=True)
    job.manager.close()
    assert steps_in(place) == ["step-00000001"]
    other = Job(place, seed=4)
    other.manager.resume()
    assert same(other.weights(), job.weights())


# What killed saves leave


def test_leftovers_of_killed_saves_are_deleted(tmp_path: Path) -> None:
    Job(tmp_path).manager.save(1, wait=True)
    for name in ("step-00000002.tmp-0123abcd", "step-00000001.old-0123abcd"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / name)
    (tmp_path / "notes.tmp-0123abcd").mkdir()
    Job(tmp_path).manager.prepare()
    assert steps_in(f"local:{tmp_path}") == ["notes.tmp-0123abcd", "step-00000001"]


def test_a_step_folder_that_is_a_link_is_used_and_deleted_as_a_link(tmp_path: Path) -> None:
    """One on another disk, say: where it leads is left alone, and the next start is not blocked."""
    folder, elsewhere = tmp_path / "ckpt", tmp_path / "elsewhere"
    Job(folder, keep_last=1).manager.save(1, wait=True)
    (folder / "step-00000001").rename(elsewhere)
    (folder / "step-00000001").symlink_to(elsewhere)
    job = Job(folder, every=1, keep_last=1)
    assert job.manager.resume() == 1
    job.train(2, 2)
    assert steps_in(f"local:{folder}") == ["step-00000002"]
    assert (elsewhere / "manifest.json").exists()
    assert Job(folder).manager.resume() == 2


def test_a_replaced_checkpoint_comes_back_if_its_successor_was_killed(tmp_path: Path) -> None:
    Job(tmp_path).manager.save(1, wait=True)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000001.old-0123abcd")
    assert Job(tmp_path).manager.resume() == 1


def test_an_object_store_forgets_what_has_no_manifest() -> None:
    files = fsspec.filesystem("memory")
    job = Job("memory://bucket/ckpt")
    job.manager.save(1, wait=True)
    files.pipe_file("/bucket/ckpt/step-00000002/rank-00000-000.safetensors", b"half")
    files.pipe_file("/bucket/ckpt/logs/step.txt", b"mine")
    assert Job("memory://bucket/ckpt").manager.resume() == 1
    assert steps_in("memory://bucket/ckpt") == ["logs", "step-00000001"]
    files.rm("/bucket", recursive=True)


# Damaged ones


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def swap(path: Path) -> None:
    shutil.copy(path.parent.parent / "step-00000001" / path.name, path)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent.parent / "step-00000001" / path.name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": cut,
    "gone": Path.unlink,
    "of-another-step": swap,
    "link": link,
}


@pytest.mark.parametrize("file", ["manifest.json", "part-00000.json", "rank-00000-000.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_passed_over(
    tmp_path: Path, damage: str, file: str
) -> None:
    job = Job(tmp_path)
    for step in (1, 2):
        job.step()
        job.manager.save(step, wait=True)
    path = tmp_path / "step-00000002" / file
    DAMAGES[damage](path)
    other = Job(tmp_path, seed=4)
    before = other.weights()
    if (damage, file) == ("of-another-step", "manifest.json"):
        with pytest.raises(CheckpointError, match=r"part-00000\.json: .* of save '1-"):
            other.manager.load(2)
    else:
        with pytest.raises(CheckpointError, match=str(path)):
            other.manager.load(tmp_path / "step-00000002")
    assert same(other.weights(), before)
    with pytest.warns(UserWarning, match="step 2 is left out"):
        assert other.manager.resume() == 1
    assert other.counter.value == 1

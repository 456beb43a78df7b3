"""The checkpoint manager in one process: when it saves, what stays, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Trainer
from ilm_compile.runtime.checkpoint import CheckpointError, CheckpointManager, manager
from ilm_compile.runtime.checkpoint.retention import superseded
from ilm_compile.runtime.checkpoint.storage import LocalStorage
from tests.runtime.handmade import make_batch, make_model, make_parallel
from tests.support.checkpoint_job import Counter, Job, same


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


@pytest.mark.parametrize("file", ["manifest.json", "rank-00000-000.safetensors"])
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
        with pytest.raises(CheckpointError, match=r"rank-00000-000\.safetensors"):
            other.manager.load(2)
    else:
        with pytest.raises(CheckpointError, match=str(path)):
            other.manager.load(tmp_path / "step-00000002")
    assert same(other.weights(), before)
    with pytest.warns(UserWarning, match="step 2 is left out"):
        assert other.manager.resume() == 1
    assert other.counter.value == 1


# What to load


def test_only_the_weights_if_asked(tmp_path: Path) -> None:
    one = Job(tmp_path)
    one.step()
    one.manager.save(5, wait=True)
    two = Job(tmp_path, seed=4, lr=0.7)
    assert two.manager.load(5, ("model",)) == 5
    assert same(two.weights(), one.weights())
    assert two.counter.value == 0
    assert not two.optimizer.state
    assert two.optimizer.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize("source", ["local:{}/step-00000005", "{}/step-00000005/"])
def test_a_checkpoint_by_its_path(tmp_path: Path, source: str) -> None:
    one = Job(tmp_path / "a")
    one.manager.save(5, wait=True)
    two = Job(tmp_path / "b", seed=4)
    assert two.manager.load(source.format(tmp_path / "a")) == 5
    assert same(two.weights(), one.weights())


def test_missing_content_is_named(tmp_path: Path) -> None:
    Job(tmp_path, optimizer=None, states={}).manager.save(1, wait=True)
    with pytest.raises(CheckpointError, match="holds no counter, optimizer, only model, random"):
        Job(tmp_path).manager.resume()
    with pytest.raises(CheckpointError, match=r"expected content of .*counter.*got \['sampler'\]"):
        Job(tmp_path).manager.load(1, ("sampler",))


def test_another_optimizer_is_refused_before_anything_changes(tmp_path: Path) -> None:
    Job(tmp_path).manager.save(1, wait=True)
    parallel = make_parallel(Plan(), make_model(seed=4))
    before = parallel.full_state_dict()
    everything = [p for _, p in parallel.named_parameters() if p.requires_grad]
    one_group = torch.optim.AdamW(everything)
    two_groups = torch.optim.AdamW([{"params": everything[-1:]}, {"params": everything[:-1]}])
    for optimizer, message in (
        (one_group, "1 param groups, got 2"),
        (two_groups, "in param group"),
    ):
        with pytest.raises(CheckpointError, match=message):
            CheckpointManager(tmp_path, parallel, optimizer=optimizer).resume()
    assert same(parallel.full_state_dict(), before)


def test_another_model_is_refused_naming_the_tensor(tmp_path: Path) -> None:
    Job(tmp_path).manager.save(1, wait=True)
    tied = make_parallel(Plan(), make_model(tied=True), tied=True)
    with pytest.raises(
        CheckpointError, match=r"another model: missing \[\], unexpected \['head'\]"
    ):
        CheckpointManager(tmp_path, tied).resume()


def test_numbers_of_an_optimizer_stay_numbers(tmp_path: Path) -> None:
    """An optimizer of one's own may keep Python numbers and scalars beside tensors."""
    job = Job(tmp_path)
    name, parameter = next(iter(job.parallel.named_parameters()))
    kept: dict[str, Any] = {"count": 3, "ratio": 0.25, "on": True, "step": torch.tensor(2.0)}
    job.optimizer.state[parameter] = kept
    job.manager.save(1, wait=True)
    other = Job(tmp_path, seed=4)
    other.manager.resume()
    assert other.optimizer.state[dict(other.parallel.named_parameters())[name]] == kept


def test_a_state_of_the_optimizer_that_cannot_be_cut_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path)
    _, parameter = next(iter(job.parallel.named_parameters()))
    job.optimizer.state[parameter] = {"history": torch.zeros(7)}
    with pytest.raises(CheckpointError, match=r"AdamW keeps history of embed as Tensor \(7,\)"):
        job.manager.save(1)


def test_a_state_that_is_not_json_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.counter.value = object()
    with pytest.raises(CheckpointError, match=r"state of counter \(Counter\) is not plain JSON"):
        job.manager.save(1)


def test_a_tensor_that_is_no_parameter_is_refused(tmp_path: Path) -> None:
    job = Job(tmp_path, optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(4))]))
    with pytest.raises(CheckpointError, match=r"shape \(4,\) that is no parameter"):
        job.manager.save(1)


# Before training begins


def test_a_folder_that_cannot_be_written_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoint folder .*file/ckpt.*NotADirectory"):
        Job(tmp_path / "file" / "ckpt").manager.prepare()


@pytest.mark.parametrize(
    ("free", "kind"), [(0, CheckpointError), (6_000, CheckpointError), (20_000, UserWarning)]
)
def test_a_full_disk_is_noticed_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, kind: Any
) -> None:
    # 618 float64 weights and a buffer of 6: 5 kB, and twice the trained ones for AdamW.
    monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: free)
    job = Job(tmp_path)
    with pytest.raises(kind) if kind is CheckpointError else pytest.warns(kind) as caught:
        job.manager.prepare()
    text = str(caught.value if kind is CheckpointError else caught[0].message)
    assert "GiB are free" in text


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("volc:vc://bucket/x", "boto3:s3://BUCKET.ENDPOINT/PATH"),
        ("nowhere://bucket/x", "cannot be opened"),
        pytest.param(
            "boto3:s3://bucket.host:9000/x",
            r"ilm_compile\[s3\]",
            marks=pytest.mark.skipif(find_spec("s3fs") is not None, reason="s3fs is installed"),
        ),
        ("memory://", "expected a folder in the bucket"),
        ("local:", "expected a path"),
    ],
)
def test_a_folder_of_no_known_kind_is_refused(folder: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Job(folder)


@pytest.mark.parametrize("options", [{"every": -1}, {"keep_last": 0}, {"keep_every": -1}])
def test_numbers_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(CheckpointError, match="expected every >= 0"):
        Job(tmp_path, **options)


def test_a_name_of_a_state_must_not_be_taken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'model'"):
        Job(tmp_path, states={"model": Counter()})


# The stop file


@pytest.mark.parametrize(
    ("text", "last", "saved"),
    [
        ("+3", 3, ["step-00000003"]),
        ("3\n", 3, ["step-00000003"]),
        ("-3", 6, ["step-00000003"]),
        ("0", 6, []),
        ("", 6, []),
    ],
)
def test_the_stop_file(tmp_path: Path, text: str, last: int, saved: list[str]) -> None:
    job = Job(tmp_path / "ckpt", stop_file=tmp_path / "deep" / "stop")
    job.manager.prepare()
    assert (tmp_path / "deep" / "stop").read_text() == "0\n"
    (tmp_path / "deep" / "stop").write_text(text)
    assert len(job.train(1, 6)) == last
    folder = tmp_path / "ckpt"
    assert sorted(p.name for p in folder.iterdir()) == saved


@pytest.mark.parametrize(
    ("text", "message"),
    [("soon", "expected .*'soon'"), ("+1", "step 1 has passed, this is step 2")],
)
def test_a_stop_file_without_effect_is_warned_of_once(
    tmp_path: Path, text: str, message: str
) -> None:
    job = Job(tmp_path / "ckpt", stop_file=tmp_path / "stop")
    job.manager.prepare()
    (tmp_path / "stop").write_text(text)
    with pytest.warns(UserWarning, match=message) as caught:
        assert not any(job.manager.after_step(step) for step in (2, 3, 4))
    assert len(caught) == 1


@pytest.mark.parametrize("text", ["+2", "-2"])
def test_the_stop_file_ends_a_fit(tmp_path: Path, text: str) -> None:
    job = Job(tmp_path / "ckpt", stop_file=tmp_path / "stop")
    job.manager.prepare()
    (tmp_path / "stop").write_text(text)
    trainer = Trainer(job.parallel, optimizer=job.optimizer, hooks=[job.manager])
    history = trainer.fit([make_batch(2)] * 4, 4, progress=False)
    assert len(history) == (2 if text == "+2" else 4)
    names = sorted(p.name for p in (tmp_path / "ckpt").iterdir())
    assert names == (["step-00000002"] if text == "+2" else ["step-00000002", "step-00000004"])

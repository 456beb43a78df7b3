"""Only sound checkpoints count: what is written, what stays, and what a run goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Trainer
from ilm_compile.runtime.checkpoint import CheckpointError, save
from tests.runtime.handmade import make_batch
from tests.support.checkpoint_job import Job, same
from tests.support.world import World

FILE = "rank-00000-000.safetensors"


def names(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


def save_steps(folder: Path, *steps: int, **options: Any) -> Job:
    job = Job(folder, **options)
    for step in steps:
        job.step()
        job.manager.save(step, wait=True)
    job.manager.close()
    return job


def damage(folder: Path, *steps: int) -> None:
    for step in steps:
        path = folder / f"step-{step:08d}" / FILE
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


def spoil(job: Job, where: str, value: float) -> None:
    parameter = dict(job.parallel.named_parameters())["embed"]
    held = {
        "weight": parameter,
        "moment": job.optimizer.state[parameter].get("exp_avg_sq", parameter),
        "buffer": job.parallel.parameters.shards["scale"].local,
    }
    with torch.no_grad():
        held[where].flatten()[0] = value


# What is written


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("where", "named"), [("weight", "model/embed"), ("moment", "optimizer/exp_avg_sq/embed")]
)
def test_what_is_not_finite_is_not_saved(
    tmp_path: Path, where: str, named: str, value: float
) -> None:
    job = Job(tmp_path, keep_last=1)
    job.step()
    job.manager.save(1, wait=True)
    spoil(job, where, value)
    with pytest.raises(
        CheckpointError, match=f"step 2 .*{named} holds numbers that are not finite.*that of step 1"
    ):
        job.manager.save(2, wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert Job(tmp_path, seed=4).manager.resume() == 1


@pytest.mark.parametrize(("value", "is_saved"), [(math.inf, True), (math.nan, False)])
def test_a_buffer_may_hold_infinities(tmp_path: Path, value: float, is_saved: bool) -> None:
    job = Job(tmp_path)
    job.step()
    spoil(job, "buffer", value)
    if is_saved:
        job.manager.save(1, wait=True)
        assert Job(tmp_path).manager.resume() == 1
    else:
        with pytest.raises(CheckpointError, match="model/scale holds numbers"):
            job.manager.save(1, wait=True)


def save_spoilt_on_one(rank: int, folder: str) -> str:
    job = Job(folder, plan=Plan(tp=2))
    job.step()
    job.manager.save(1, wait=True)
    if rank == 1:
        for _, parameter in job.parallel.named_parameters():
            with torch.no_grad():
                parameter.to_local().fill_(math.nan)  # type: ignore[attr-defined]
    try:
        job.manager.save(2, wait=True)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_one_rank_that_is_not_finite_is_enough(world2: World, tmp_path: Path) -> None:
    for told in world2.run(save_spoilt_on_one, str(tmp_path)):
        assert "step 2" in told
        assert "rank 1: this state: model/" in told
    assert names(tmp_path) == [1]


def test_a_training_that_broke_goes_on_from_before(tmp_path: Path) -> None:
    """The weights are lost in step 3; steps from them are skipped, and never saved."""
    job = Job(tmp_path, every=1, keep_last=2)
    trainer = Trainer(job.parallel, optimizer=job.optimizer, hooks=[job.manager])
    trainer.fit([make_batch(2)] * 2, 2, progress=False)
    spoil(job, "weight", math.nan)
    with pytest.raises(CheckpointError, match=r"step 3 .*not finite.*that of step 2"):
        trainer.fit([make_batch(2)] * 9, 9, progress=False)
    assert names(tmp_path) == [1, 2]


# What was found


@pytest.fixture
def old_saves(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Saves as before they looked at the numbers, until called."""
    check = save.check_finite
    monkeypatch.setattr(save, "check_finite", lambda *_: None)
    return lambda: monkeypatch.setattr(save, "check_finite", check)


def test_those_found_without_finite_numbers_are_left_out(
    tmp_path: Path, old_saves: Callable[[], None]
) -> None:
    job = Job(tmp_path, keep_last=3)
    job.step()
    job.manager.save(1, wait=True)
    kept = job.weights()
    spoil(job, "weight", math.nan)
    for step in (2, 3):
        job.manager.save(step, wait=True)
    old_saves()
    other = Job(tmp_path, seed=4)
    with pytest.warns(UserWarning, match=r"step 3 is left out: .*not finite.*step 1 is the newest"):
        assert other.manager.resume() == 1
    assert same(other.weights(), kept)
    with pytest.raises(CheckpointError, match="model/embed holds numbers that are not finite"):
        Job(tmp_path, seed=4).manager.load(3)


@pytest.mark.filterwarnings("ignore:checkpoint of step")
def test_damaged_ones_are_not_among_those_that_stay(tmp_path: Path) -> None:
    """Nor do they stand above those of a run that goes on from before them."""
    save_steps(tmp_path, 2, 4, 6, 8, keep_last=4)
    damage(tmp_path, 6, 8)
    job = Job(tmp_path, keep_last=2)
    assert job.manager.resume() == 4
    job.manager.save(5, wait=True)
    job.manager.wait()
    job.manager.close()
    assert names(tmp_path) == [4, 5, 6, 8]
    again = Job(tmp_path, keep_last=2)
    assert again.manager.resume() == 5
    for step in (6, 7):
        again.manager.save(step, wait=True)
    again.manager.close()
    assert names(tmp_path) == [6, 7, 8]


def test_one_found_is_read_before_it_counts(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, keep_last=3)
    damage(tmp_path, 2)
    job = Job(tmp_path, keep_last=3)
    assert job.manager.resume() == 3
    job.manager.save(4, wait=True)
    job.manager.close()
    assert names(tmp_path) == [1, 2, 3, 4]


def test_one_cut_short_since_it_was_written_does_not_count(tmp_path: Path) -> None:
    job = Job(tmp_path, keep_last=2)
    for step in (1, 2, 3):
        job.manager.save(step, wait=True)
        if step == 2:
            path = tmp_path / "step-00000002" / FILE
            path.write_bytes(path.read_bytes()[:-1])
    job.manager.close()
    assert names(tmp_path) == [1, 2, 3]


# Where a run begins


def test_a_run_does_not_begin_anew_over_damaged_ones(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    damage(tmp_path, 1, 2)
    job = Job(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"none of its checkpoints .*step 2 is left out.*step 1 is left out"
    ):
        job.manager.resume()
    assert names(tmp_path) == [1, 2]


@pytest.mark.parametrize("how", ["save", "fit"])
def test_a_run_does_not_begin_anew_over_sound_ones(tmp_path: Path, how: str) -> None:
    save_steps(tmp_path, 4)
    job = Job(tmp_path)
    trainer = Trainer(job.parallel, optimizer=job.optimizer, hooks=[job.manager])
    with pytest.raises(CheckpointError, match=r"steps \[4\], and this run begins anew"):
        job.manager.save(1) if how == "save" else trainer.fit([make_batch(2)], 1, progress=False)
    assert trainer.num_steps == 0
    assert names(tmp_path) == [4]


def test_a_run_that_goes_back_must_clear_the_way(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    job = Job(tmp_path)
    job.manager.load(1)
    with pytest.raises(CheckpointError, match=r"steps \[2\], and this run goes on from step 1"):
        job.manager.save(2)
    (tmp_path / "step-00000002").rename(tmp_path / "old")
    job.manager.save(2, wait=True)
    assert names(tmp_path) == [1, 2]

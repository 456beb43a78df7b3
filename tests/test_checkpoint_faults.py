"""Faults for real: processes killed in a save and in a load, full disks, folders not shared."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from ilm_compile.program.plan import Plan
from ilm_compile.runtime.checkpoint import CheckpointError, save
from tests.support.checkpoint_job import Job, same
from tests.support.crashes import Fuse, resumed_after_each_crash
from tests.support.world import World, WorldError

PLAN = Plan(tp=2)


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """In a process of its own, which forks one for each moment."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        found = pool.submit(resumed_after_each_crash, str(tmp_path)).result(timeout=300)
    assert len(found) > 25
    assert found == sorted(found)  # before the rename step 1, from then on step 2
    assert set(found) == {1, 2}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_fills_up_leaves_the_older_checkpoint(
    tmp_path: Path, asynchronous: bool
) -> None:
    job = Job(tmp_path, asynchronous=asynchronous)
    job.manager.save(1, wait=True)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 .*was not written: OSError.*too large"):
            job.manager.save(2, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    job.manager.save(3, wait=True)
    assert Job(tmp_path).manager.resume() == 3


def save_with_a_fault(rank: int, folder: str, fault: str) -> str:
    """Save step 1 well and step 2 with a fault on rank 1; the error that this rank gets."""
    job = Job(folder, plan=PLAN)
    job.step()
    job.manager.save(1, wait=True)
    if fault == "not shared" and rank == 1:
        job.manager._storage._root = Path(f"{folder}-of-another-node")  # type: ignore[attr-defined]
    write = save.write_tensor_file
    if fault == "full" and rank == 1:
        save.write_tensor_file = _full
    try:
        job.manager.save(2, wait=True)
    except CheckpointError as error:
        return str(error)
    finally:
        save.write_tensor_file = write
    return ""


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("full", "rank 1: OSError: [Errno 28] No space left on device"),
        ("not shared", "expected a folder that all nodes share"),
    ],
)
def test_a_fault_of_one_rank_is_told_on_all(
    world2: World, tmp_path: Path, fault: str, message: str
) -> None:
    texts = world2.run(save_with_a_fault, f"{tmp_path}/ckpt", fault)
    assert all(message in text for text in texts), texts
    assert Job(tmp_path / "ckpt", seed=4).manager.resume() == 1


def save_until_killed(rank: int, folder: str, victim: int, at: int) -> None:
    job = Job(folder, plan=PLAN)
    job.step()
    job.manager.save(1, wait=True)
    job.step()
    if rank == victim:
        Fuse(at)
    job.manager.save(2)
    for step in range(3, 1000):
        job.step()
        job.manager.after_step(step)


def load_until_killed(rank: int, folder: str, victim: int) -> None:
    job = Job(folder, plan=PLAN, seed=4)
    if rank == victim:
        from ilm_compile.runtime.checkpoint import slices

        reads = iter(range(5))
        read = slices.read_box

        def dying(*arguments: object) -> object:
            if next(reads, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return read(*arguments)  # type: ignore[arg-type]

        slices.read_box = dying  # type: ignore[assignment]
    job.manager.resume()


@pytest.mark.parametrize(("victim", "at"), [(1, 4), (0, 12)])
def test_a_rank_killed_in_a_save(world2: World, tmp_path: Path, victim: int, at: int) -> None:
    """Then in a load: the older checkpoint is whole after both, whatever the plan."""
    start = time.monotonic()
    with pytest.raises(WorldError):
        world2.run(save_until_killed, str(tmp_path), victim, at, timeout=60)
    assert time.monotonic() - start < 40
    if victim == 1:
        with pytest.raises(WorldError):
            world2.run(load_until_killed, str(tmp_path), victim, timeout=60)
    job = Job(tmp_path, seed=4)
    assert job.manager.resume() == 1
    reference = Job(tmp_path / "unused")
    reference.step()
    weights = job.weights()
    assert not same(weights, Job(tmp_path / "unused", seed=4).weights())
    for name, value in reference.weights().items():
        assert weights[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]

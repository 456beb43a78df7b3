"""What each rank has of its own comes back to it: its random numbers, its slices, its buffers."""

from pathlib import Path

import numpy as np
import torch

from ilm_compile.program.plan import Plan
from tests.support.checkpoint_job import Job, same
from tests.support.world import World


def draw() -> tuple[float, float]:
    return torch.rand(()).item(), float(np.random.rand())


def save_and_resume(rank: int, folder: str) -> tuple[tuple[float, float], tuple[float, float]]:
    job = Job(folder, plan=Plan(tp=2))
    torch.manual_seed(rank)
    np.random.seed(rank)
    job.manager.save(1, wait=True)
    expected = draw()
    torch.manual_seed(7)
    np.random.seed(7)
    job.manager.resume()
    return expected, draw()


def test_every_rank_goes_on_with_its_own_random_numbers(world2: World, tmp_path: Path) -> None:
    results = world2.run(save_and_resume, str(tmp_path))
    for expected, found in results:
        assert found == expected
    assert results[0] != results[1]


def test_the_steps_that_dropout_depends_on_are_counted_on(tmp_path: Path) -> None:
    job, other = Job(tmp_path), Job(tmp_path)
    job.step()
    job.manager.save(1, wait=True)
    other.manager.resume()
    assert other.parallel.num_steps == 1


def test_a_checkpoint_brings_its_buffers(tmp_path: Path) -> None:
    job, other = Job(tmp_path), Job(tmp_path, seed=4)
    job.manager.save(1, wait=True)
    assert not torch.equal(job.weights()["scale"], other.weights()["scale"])
    other.manager.resume()
    assert same(other.weights(), job.weights())

"""The promise: training saved under any plan goes on under any other as if nothing had happened."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ilm_compile
from examples.custom_pass import MergeGateUp
from ilm_compile.models import internlm2_tiny
from ilm_compile.runtime import adamw
from ilm_compile.runtime.checkpoint import CheckpointManager
from tests.support.promote import promoted_float32
from tests.support.resume import NUM_STEPS, PLANS, WORLD_SIZES, Run
from tests.support.world import World

Curves = dict[tuple[str, str], list[float]]
SIZES = sorted(set(WORLD_SIZES.values()))


def train_through(rank: int) -> list[float]:
    return Run("single", seed=0).train(2 * NUM_STEPS)


def train_and_save(rank: int, plans: list[str], folder: str) -> dict[str, list[float]]:
    """The curve of the first steps under each plan, saved in a folder of the plan's name."""
    curves = {}
    for plan in plans:
        run = Run(plan, seed=0)
        manager = run.manager(f"{folder}/{plan}")
        curves[plan] = run.train(NUM_STEPS, manager)
        manager.close()
    return curves


def resume_and_train(rank: int, plans: list[str], folder: str) -> Curves:
    """The curves of the next steps under each plan, from what each plan saved.

    One run loads them all in turn: whatever it holds from before must be replaced.
    """
    curves = {}
    for plan in plans:
        run = Run(plan, seed=1)
        for saved in PLANS:
            manager = run.manager(f"{folder}/{saved}")
            assert manager.resume() == NUM_STEPS
            curves[saved, plan] = run.train(NUM_STEPS)
            manager.close()
    return curves


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[int, World]]:
    found = {size: World(size) for size in SIZES}
    yield found
    for world in found.values():
        world.close()


@pytest.fixture(scope="module")
def uninterrupted(worlds: dict[int, World]) -> list[float]:
    return worlds[1].run(train_through)[0]


@pytest.fixture(scope="module")
def saved(
    worlds: dict[int, World], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, list[float]]]:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    curves: dict[str, list[float]] = {}
    for size in SIZES:
        curves |= worlds[size].run(train_and_save, _of_size(size), folder)[0]
    return folder, curves


@pytest.fixture(scope="module")
def resumed(worlds: dict[int, World], saved: tuple[str, dict[str, list[float]]]) -> Curves:
    curves: Curves = {}
    for size in SIZES:
        plans = _of_size(size)
        curves |= worlds[size].run(resume_and_train, plans, saved[0], timeout=300)[0]
    return curves


def _of_size(size: int) -> list[str]:
    return [plan for plan in PLANS if WORLD_SIZES[plan] == size]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_a_save_does_not_change_the_training(
    plan: str, uninterrupted: list[float], saved: tuple[str, dict[str, list[float]]]
) -> None:
    assert saved[1][plan] == pytest.approx(uninterrupted[:NUM_STEPS], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("second", PLANS)
@pytest.mark.parametrize("first", PLANS)
def test_training_goes_on_under_another_plan(
    first: str, second: str, uninterrupted: list[float], resumed: Curves
) -> None:
    assert resumed[first, second] == pytest.approx(uninterrupted[NUM_STEPS:], rel=1e-9)


# Under a pass that merges weights

MERGED: dict[str, Any] = {"tp": 2, "pp": 2, "num_microbatches": 2, "passes": [MergeGateUp()]}
PLAIN: dict[str, Any] = {"num_microbatches": 2}


def train_merged(
    rank: int, folder: str, options: dict[str, Any], num_steps: int
) -> tuple[list[float], list[str]]:
    """Losses of the next steps from what is in `folder`, saved there; names of the parameters."""
    torch.manual_seed(0)
    model = internlm2_tiny(num_layers=2, max_seq_len=16).double()
    with promoted_float32():
        parallel = ilm_compile.parallelize(model, **options)
        optimizer = adamw(parallel.named_parameters(), lr=0.01)
        manager = CheckpointManager(folder, parallel, optimizer=optimizer)
        start = manager.resume() or 0
        losses = []
        for step in range(start, start + num_steps):
            parallel.zero_grad()
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(512, (2, 16), generator=generator)
            loss = parallel.execute_schedule({"input_ids": tokens, "labels": tokens})
            assert isinstance(loss, torch.Tensor)
            losses.append(loss.item())
            optimizer.step()
        manager.save(start + num_steps, wait=True)
        manager.close()
    return losses, [name for name, _ in parallel.named_parameters()]


@pytest.mark.parametrize("merged", ["first", "second"])
def test_training_goes_on_with_and_without_a_pass_that_merges_weights(
    worlds: dict[int, World], tmp_path: Path, merged: str
) -> None:
    (through, _), *_ = worlds[1].run(train_merged, f"{tmp_path}/through", PLAIN, 4)
    legs = [(4, MERGED), (1, PLAIN)] if merged == "first" else [(1, PLAIN), (4, MERGED)]
    losses, names = [], set()
    for size, options in legs:
        (part, own), *_ = worlds[size].run(train_merged, f"{tmp_path}/ckpt", options, 2)
        losses += part
        names |= set(own)
    assert any("_and_up" in name for name in names)
    assert losses == pytest.approx(through, rel=1e-9)


def test_the_curve_depends_on_what_is_resumed(uninterrupted: list[float], resumed: Curves) -> None:
    """The steps differ enough that a lost state would show: fresh weights start elsewhere."""
    assert abs(uninterrupted[0] - uninterrupted[NUM_STEPS]) > 0.05
    assert len({round(loss, 6) for loss in uninterrupted}) == 2 * NUM_STEPS

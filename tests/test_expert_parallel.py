"""Expert parallelism in real processes: float64, loss and every gradient, unequal targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import ilm_compile
from ilm_compile.runtime import adamw
from ilm_compile.runtime.checkpoint import CheckpointManager
from tests.support.equality import EXAMPLE, Case, assert_equal, make_batch, make_model
from tests.support.promote import promoted_float32
from tests.support.training import train_and_compare
from tests.support.world import World
from tests.support.zoo import EXPERTS_LISTED

BOUND = 1e-10
MODELS = ("experts", "Mixtral", *EXPERTS_LISTED)
# Beside ep=2 and more, over two and four processes.
PLANS = {
    2: [{"ep": 2, "num_microbatches": 3}],
    4: [
        {"ep": 4},
        {"ep": 2, "num_microbatches": 2},
        {"ep": 2, "zero": 3, "num_microbatches": 2},
        {"ep": 2, "tp": 2},
        {"ep": 2, "cp": 2, "num_microbatches": 2},
        {"ep": 2, "pp": 2, "num_microbatches": 3, "checkpoint": 0.5},
    ],
}
TRAINED = [{"ep": 2}, {"ep": 2, "zero": 3}, {"ep": 2, "tp": 2}, {"ep": 2, "pp": 2}]


def cases(world: int) -> list[Case]:
    models = MODELS if world == 2 else MODELS[:3]
    return [Case(m, plan, world // ranks(plan)) for m in models for plan in PLANS[world]]


def ranks(plan):
    return plan["ep"] * plan.get("cp", 1) * plan.get("tp", 1) * plan.get("pp", 1)


@pytest.mark.parametrize("case", cases(2), ids=str)
def test_two_processes_equal_the_single_device_model(case, world2):
    assert_equal(world2, case, BOUND)


@pytest.mark.parametrize("case", cases(4), ids=str)
def test_four_processes_equal_the_single_device_model(case, world4):
    assert_equal(world4, case, BOUND)


@pytest.mark.parametrize("plan", TRAINED, ids=str)
def test_ten_adamw_steps_end_in_the_same_weights(plan, world4):
    error, _ = world4.run(train_and_compare, Case("experts", plan, 4 // ranks(plan)), 10)[0]
    assert error <= 1e-8


@pytest.mark.parametrize("plan", [{"ep": 2, "num_microbatches": 2}, {"ep": 2, "cp": 2, "tp": 2}])
def test_the_proof_has_an_axis_of_experts(plan):
    report = ilm_compile.verify(make_model("experts"), example_inputs=EXAMPLE, dp=2, **plan)
    assert report.ok, str(report)


# One training, each leg of it under another plan, from what the leg before has saved.
LEGS: list[tuple[int, dict[str, Any]]] = [
    (4, {"ep": 2, "zero": 3}),
    (4, {"ep": 4}),
    (1, {}),
    (4, {"ep": 2, "pp": 2}),
    (2, {"tp": 2}),
    (4, {"ep": 2, "tp": 2}),
    (4, {"ep": 2, "cp": 2}),
]
LEG = 2  # steps
ROWS = 4


def train_leg(rank: int, folder: str, plan: dict[str, Any], size: int, num_steps: int):
    """Loss and gradient norm of the next steps from what is in `folder`, saved there."""
    dp = size // ranks({"ep": 1, **plan})
    with promoted_float32():
        parallel = ilm_compile.parallelize(
            make_model("experts"), example_inputs=EXAMPLE, num_microbatches=ROWS // 2 // dp, **plan
        )
        optimizer = adamw(parallel.named_parameters(), lr=0.01)
        manager = CheckpointManager(folder, parallel, optimizer=optimizer)
        start = manager.resume() or 0
        found = []
        for step in range(start, start + num_steps):
            parallel.zero_grad()
            batch = make_batch(ROWS)
            batch["input_ids"] = (batch["input_ids"] + step) % 512
            loss = parallel.execute_schedule(batch)
            assert isinstance(loss, Tensor)
            found += [loss.item(), parallel.clip_grad_norm_(1.0).item()]
            optimizer.step()
        manager.save(start + num_steps, wait=True)
        manager.close()
    return found


def test_a_training_goes_on_over_other_numbers_of_ranks_that_divide_the_experts(
    world2: World, world4: World, tmp_path: Path
) -> None:
    worlds = {2: world2, 4: world4}
    through = train_leg(0, f"{tmp_path}/through", {}, 1, LEG * len(LEGS))
    legs: list[float] = []
    for size, plan in LEGS:
        leg = (f"{tmp_path}/legs", plan, size, LEG)
        results = worlds[size].run(train_leg, *leg) if size > 1 else [train_leg(0, *leg)]
        assert all(each == results[0] for each in results)
        legs += results[0]
    assert legs == pytest.approx(through, rel=1e-9)
    assert len({round(number, 6) for number in legs}) == len(legs)

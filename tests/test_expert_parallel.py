"""Expert parallelism in real processes: float64, loss and every gradient, unequal targets."""

from __future__ import annotations

import pytest

from tests.support.equality import Case, assert_equal
from tests.support.training import train_and_compare
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

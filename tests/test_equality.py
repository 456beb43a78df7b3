"""Same training under any plan, in real processes over gloo: float64, loss and every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.equality import Case, assert_prepared_equal
from tests.support.training import train_and_compare

MODELS = ("internlm", "internlm2", "llama", "gpt2")
BOUND = 1e-10

# (tp, pp, dp) of the promise, over two and over four processes.
SIZES = {
    2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)],
    4: [(2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 4, 1), (4, 1, 1)],
}
# What else may vary, each tried on one size of world that has it.
VARIANTS = {
    2: [
        (1, 2, 1, {"schedule": "gpipe", "num_microbatches": 4}),
        (1, 2, 1, {"schedule": "1f1b", "num_microbatches": 1}),
        (1, 2, 1, {"schedule": "1f1b", "num_microbatches": 5}),
        (1, 2, 1, {"num_chunks": 2, "num_microbatches": 4}),
        (1, 2, 1, {"num_chunks": 2, "schedule": "gpipe", "num_microbatches": 3}),
        (1, 2, 1, {"checkpoint": 0.5}),
        (1, 2, 1, {"checkpoint": True}),
        (2, 1, 1, {"sequence_parallel": True}),
        (2, 1, 1, {"sequence_parallel": False}),
        (2, 1, 1, {"embed_split_hidden": True}),
        (2, 1, 1, {"embed_split_hidden": False, "num_microbatches": 3}),
        (2, 1, 1, {"checkpoint": True, "sequence_parallel": True}),
        (1, 1, 2, {"zero": 3, "num_microbatches": 3}),
        (1, 1, 2, {"zero": 3, "checkpoint": 0.5}),
    ],
    4: [
        (2, 2, 1, {"sequence_parallel": True, "num_microbatches": 4, "checkpoint": 0.5}),
        (2, 2, 1, {"sequence_parallel": False, "num_chunks": 2}),
        (1, 4, 1, {"num_chunks": 2, "num_microbatches": 8, "checkpoint": 0.5}),
        (1, 4, 1, {"num_microbatches": 2}),
        (4, 1, 1, {"sequence_parallel": True}),
        (2, 1, 2, {"zero": 3, "sequence_parallel": True}),
        (1, 2, 2, {"zero": 3, "num_chunks": 2, "num_microbatches": 4}),
    ],
}


def cases(world: int) -> list[Case]:
    plain = [(*sizes, {}) for sizes in SIZES[world]]
    plans = [(dp, {"tp": tp, "pp": pp, **more}) for tp, pp, dp, more in plain + VARIANTS[world]]
    return [Case(model, plan, dp) for model in MODELS for dp, plan in plans]


@pytest.mark.parametrize("case", cases(2), ids=str)
def test_two_processes_equal_the_single_device_model(case, prepared):
    assert_prepared_equal(prepared, 2, case, BOUND)


@pytest.mark.parametrize("case", cases(4), ids=str)
def test_four_processes_equal_the_single_device_model(case, prepared):
    assert_prepared_equal(prepared, 4, case, BOUND)


@pytest.mark.parametrize(
    "plan", [{"tp": 2, "pp": 2}, {"pp": 4}, {"pp": 4, "num_chunks": 2}], ids=str
)
@pytest.mark.parametrize("model", ["internlm2", "gpt2"])
def test_ten_adamw_steps_end_in_the_same_weights(model, plan, world4):
    """GPT-2's tied embedding lives on the first and the last stage and must stay one weight."""
    error, copies, _ = world4.run(train_and_compare, replace(Case(model), plan=plan), 10)[0]
    assert error <= 1e-8
    assert copies <= 1e-12

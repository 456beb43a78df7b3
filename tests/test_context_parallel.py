"""Context parallelism in real processes: float64, loss and every gradient, unequal targets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.axes import case, each_once
from tests.support.equality import Case, assert_prepared_equal
from tests.support.training import train_and_compare
from tests.support.zoo import LISTED

BOUND = 1e-10
MODELS = ("internlm", "internlm2", "llama", "gpt2", *LISTED)
# (tp, pp, dp) beside cp=2 and more, over two, four and eight processes.
PLANS = {
    2: [{"cp": 2, "num_microbatches": 3}],
    4: [
        {"cp": 4},
        {"cp": 2, "tp": 2},
        {"cp": 2, "tp": 2, "sequence_parallel": True},
        {"cp": 2, "pp": 2, "num_microbatches": 3, "checkpoint": 0.5},
        {"cp": 2, "zero": 3, "num_microbatches": 2},
    ],
}
HEADS, QUERIES, RING = ({"cp_attention": way} for way in ("heads", "queries", "ring"))
# Attention divided in the way that is not the cheaper one here, or where only one is possible:
# groups of heads, a sliding window (Mistral), fewer key heads than ranks, heads that nothing
# divides, documents that end anywhere.
ATTENTION = {
    2: [
        *(Case(name, {"cp": 2, **HEADS}) for name in ("internlm2", "Mistral")),
        *(Case("internlm2", {"cp": 2, **way}, packed=True) for way in (HEADS, QUERIES)),
        Case("Qwen2", {"cp": 2, **RING, "num_microbatches": 2}),
    ],
    4: [
        *(Case(name, {"cp": 4, **QUERIES}) for name in ("llama", "Mistral", "one key head")),
        Case("InternLM3", {"cp": 4, **HEADS}),  # key heads repeated
        Case("three heads", {"cp": 4}),
        Case("internlm2", {"cp": 4, **QUERIES}, packed=True),
        Case("internlm", {"cp": 2, "tp": 2, "sequence_parallel": True, **QUERIES}, packed=True),
        Case("llama", {"cp": 2, "pp": 2, "checkpoint": 1.0, **QUERIES}),
        *(Case(name, {"cp": 4, **RING}) for name in ("three heads", "Mistral")),
        Case("internlm2", {"cp": 4, **RING}, packed=True),
        Case("internlm", {"cp": 2, "tp": 2, "sequence_parallel": True, **RING}, packed=True),
        Case("internlm2", {"cp": 2, "pp": 2, "checkpoint": 1.0, **QUERIES}, packed=True),
        Case("llama", {"cp": 2, "pp": 2, "checkpoint": 1.0, "num_microbatches": 3, **RING}),
    ],
}  # fmt: skip


# Each model once over two processes, each plan once over four; many models under every plan:
# python -m benchmarks.axes_equality
ONCE = [name for name in MODELS if name not in ("llama", "gpt2")]  # listed, with fewer blocks
TWO = each_once(ONCE, PLANS[2] * len(ONCE), 2)
FOUR = each_once(MODELS, PLANS[4], 4)


@pytest.mark.parametrize("case", [*TWO, *ATTENTION[2]], ids=str)
def test_two_processes_equal_the_single_device_model(case, prepared):
    assert_prepared_equal(prepared, 2, case, BOUND)


@pytest.mark.parametrize("case", [*FOUR, *ATTENTION[4]], ids=str)
def test_four_processes_equal_the_single_device_model(case, prepared):
    assert_prepared_equal(prepared, 4, case, BOUND)


def test_eight_processes_on_three_axes_equal_the_single_device_model(prepared):
    assert_prepared_equal(prepared, 8, case("internlm2", "cp", (2, 2, 2, 1)), BOUND)


@pytest.mark.parametrize("plan", [{"cp": 2, "tp": 2}, {"cp": 2, "pp": 2}], ids=str)
def test_ten_adamw_steps_end_in_the_same_weights(plan, world4):
    trained = world4.run(train_and_compare, replace(Case("gpt2"), plan=plan), 10)[0]
    assert trained.weights <= 1e-8

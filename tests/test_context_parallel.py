"""Context parallelism in real processes: float64, loss and every gradient, unequal targets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.equality import Case, assert_equal
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
HEADS, QUERIES = ({"cp_attention": way} for way in ("heads", "queries"))
# Attention divided in the way that is not the cheaper one here, or where only one is possible:
# groups of heads, a sliding window (Mistral), fewer key heads than ranks, heads that nothing
# divides, documents that end anywhere.
ATTENTION = {
    2: [
        *(Case(name, {"cp": 2, **HEADS}) for name in ("internlm2", "Mistral")),
        *(Case("internlm2", {"cp": 2, **way}, packed=True) for way in (HEADS, QUERIES)),
    ],
    4: [
        *(Case(name, {"cp": 4, **QUERIES}) for name in ("llama", "Mistral", "one key head")),
        Case("InternLM3", {"cp": 4, **HEADS}),  # key heads repeated
        Case("three heads", {"cp": 4}),
        Case("internlm2", {"cp": 4, **QUERIES}, packed=True),
        Case("internlm", {"cp": 2, "tp": 2, "sequence_parallel": True, **QUERIES}, packed=True),
        Case("llama", {"cp": 2, "pp": 2, "checkpoint": 1.0, **QUERIES}),
    ],
}  # fmt: skip


def cases(world: int) -> list[Case]:
    models = MODELS if world == 2 else MODELS[:4]
    return [Case(m, plan, world // ranks(plan)) for m in models for plan in PLANS[world]]


def ranks(plan):
    return plan["cp"] * plan.get("tp", 1) * plan.get("pp", 1)


@pytest.mark.parametrize("case", [*cases(2), *ATTENTION[2]], ids=str)
def test_two_processes_equal_the_single_device_model(case, world2):
    assert_equal(world2, case, BOUND)


@pytest.mark.parametrize("case", [*cases(4), *ATTENTION[4]], ids=str)
def test_four_processes_equal_the_single_device_model(case, world4):
    assert_equal(world4, case, BOUND)


@pytest.mark.parametrize("plan", [{"cp": 2, "tp": 2}, {"cp": 2, "pp": 2}], ids=str)
def test_ten_adamw_steps_end_in_the_same_weights(plan, world4):
    error, _ = world4.run(train_and_compare, replace(Case("gpt2"), plan=plan), 10)[0]
    assert error <= 1e-8

"""The memory of a step: published formulas by hand, and what each part of a plan does to it."""

from dataclasses import replace
from typing import Any

import pytest

from ilm_compile.cost.constants import SOFTWARE
from ilm_compile.cost.sizes import ModelSizes
from ilm_compile.cost.step_memory import (
    StepMemory,
    activation_bytes,
    static_bytes,
    step_memory,
)
from tests.cost.steps import GPT, LLAMA, plan

OURS, MEGATRON = SOFTWARE["ilm_compile"], SOFTWARE["megatron"]


def held(sizes: ModelSizes = LLAMA, **changes: Any) -> StepMemory:
    return step_memory(sizes, plan(**changes), OURS)


# Korthikanti et al., 2022, arXiv 2205.05198, table 2: bytes per layer, in units of s b h.
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, lambda t, scores: 34 + scores),
        ({"tp": 4}, lambda t, scores: 10 + 24 / t + scores / t),
        ({"tp": 4, "sequence_parallel": True}, lambda t, scores: (34 + scores) / t),
        ({"tp": 4, "recompute": "selective"}, lambda t, scores: 10 + 24 / t),
        (
            {"tp": 4, "sequence_parallel": True, "recompute": "selective"},
            lambda t, scores: 34 / t,
        ),
        ({"recompute": "full"}, lambda t, scores: 2),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_activations_are_those_of_the_paper(changes: dict[str, Any], expected: Any) -> None:
    given = plan(micro_batch=3, **changes)
    unit = given.seq * given.micro_batch * GPT.hidden
    scores = 5 * GPT.heads * given.seq / GPT.hidden
    found = activation_bytes(GPT, given, MEGATRON) / unit
    assert found == pytest.approx(expected(given.tp, scores))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"zero": 0}, 18),
        ({"zero": 1}, 6 + 12 / 8),
        ({"zero": 1, "zero_group": 4}, 6 + 12 / 4),
        ({"zero": 2}, 2 + 16 / 8),
        ({"zero": 3}, 18 / 8),
    ],
    ids=str,
)
def test_zero_divides_what_it_says(changes: dict[str, Any], expected: float) -> None:
    assert static_bytes(GPT, plan(dp=8, **changes), MEGATRON, 1.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"dp": 8, "zero": 1}, {"dp": 8, "zero": 3}),
        ({"recompute": "none"}, {"recompute": "selective"}),
        ({"recompute": "selective"}, {"recompute": "full"}),
        ({"recompute": "none"}, {"recompute": "full", "recompute_share": 0.5}),
        ({"micro_batch": 2}, {"micro_batch": 1}),
        ({"tp": 1}, {"tp": 2}),
        ({"cp": 1}, {"cp": 2}),
        ({"pp": 4, "schedule": "gpipe", "num_microbatches": 32}, {"pp": 4}),
        ({"pp": 4, "schedule": "interleaved_1f1b", "chunks": 2}, {"pp": 4}),
        ({"pp": 4, "schedule": "zb_h2"}, {"pp": 4, "schedule": "zb_h1"}),
    ],
    ids=str,
)
def test_what_takes_less(more: dict[str, Any], less: dict[str, Any]) -> None:
    assert held(**more).total > held(**less).total


def test_experts_are_divided_among_their_ranks() -> None:
    sparse = replace(LLAMA, experts=8, ffn=4096, top_k=2)
    assert held(sparse, dp=8, ep=8).static < 0.5 * held(sparse, dp=8).static


def test_a_tied_head_is_held_once() -> None:
    both, one = (held(replace(LLAMA, tied=tied)).static for tied in (False, True))
    assert both - one == pytest.approx(16 * LLAMA.vocab * LLAMA.hidden)


# Zero Bubble, arXiv 2401.10241, tables 4 and 6: GB of 2**30 bytes.
@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "pp", "micro_batch", "schedule", "measured"),
    [
        (2304, 22, 24, 8, 6, "1f1b", 30),
        (2304, 22, 24, 8, 6, "zb_1p", 32),
        (6144, 62, 48, 32, 1, "1f1b", 43),
        (6144, 62, 48, 32, 1, "zb_2p", 72),
        (4096, 30, 32, 16, 6, "zb_v", 64),
        (5120, 46, 40, 24, 2, "zb_v", 45),
    ],
)
def test_published_memory(
    hidden: int, layers: int, heads: int, pp: int, micro_batch: int, schedule: str, measured: int
) -> None:
    sizes = ModelSizes(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        ffn=4 * hidden,
        ffn_matrices=2,
        vocab=51200,
    )
    given = plan(
        seq=1024, micro_batch=micro_batch, num_microbatches=96, pp=pp, schedule=schedule, zero=0
    )
    assert step_memory(sizes, given, MEGATRON).total / 2**30 == pytest.approx(measured, rel=0.05)

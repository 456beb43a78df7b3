"""The time of a step: what each part of a plan does to it, and some published steps."""

from dataclasses import replace
from typing import Any

import pytest

from ilm_compile.cost.constants import SOFTWARE, software_named
from ilm_compile.cost.hardware import HARDWARE
from ilm_compile.cost.sizes import ModelSizes, StepPlan
from ilm_compile.cost.step_time import StepTime, step_time
from ilm_compile.errors import PlanError
from tests.cost.steps import LLAMA, plan

OURS = SOFTWARE["ilm_compile"]


def timed(sizes: ModelSizes = LLAMA, machine: str = "h100", **changes: Any) -> StepTime:
    return step_time(sizes, plan(**changes), HARDWARE[machine], OURS)


def test_a_step_does_not_beat_the_peak_and_is_not_absurd() -> None:
    given = plan(micro_batch=2, recompute="none")
    seconds = step_time(LLAMA, given, HARDWARE["h100"], OURS).total
    tokens = given.seq * given.micro_batch * given.num_microbatches
    utilisation = LLAMA.token_flops(given.seq) * tokens / seconds / 989e12
    assert 0.3 < utilisation < 0.7


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"machine": "a100-80g"}, {"machine": "h100"}),
        ({"recompute": "full"}, {"recompute": "selective"}),
        ({"recompute": "selective"}, {"recompute": "none"}),
        ({"recompute": "full"}, {"recompute": "full", "recompute_share": 0.5}),
        ({"tp": 1}, {"tp": 2}),
        ({"cp": 1}, {"cp": 2}),
        ({"tp": 8}, {"tp": 8, "sequence_parallel": True}),
        ({"precision": "bf16"}, {"precision": "fp8"}),
        ({"pp": 4}, {"pp": 4, "schedule": "interleaved_1f1b", "chunks": 2}),
        ({"pp": 4}, {"pp": 4, "schedule": "zb_h1"}),
        ({"dp": 8, "zero": 3}, {"dp": 8, "zero": 2}),
        ({"dp": 64, "zero": 0}, {"dp": 64, "zero": 1}),
        ({"dp": 64}, {"dp": 8}),
        ({"micro_batch": 1, "num_microbatches": 16}, {"micro_batch": 2}),
    ],
    ids=str,
)
def test_what_is_faster(slower: dict[str, Any], faster: dict[str, Any]) -> None:
    assert timed(**slower).total > timed(**faster).total


def test_full_recompute_costs_about_a_forward() -> None:
    ratio = timed(recompute="full").total / timed(recompute="none").total
    assert ratio == pytest.approx(4 / 3, rel=0.06)


def test_the_bubble_is_the_schedules() -> None:
    headless = replace(LLAMA, vocab=16)
    time = timed(headless, pp=4, num_microbatches=16)
    busy = time.total - time.bubble - time.optimizer - time.exposed
    assert time.bubble / busy == pytest.approx(3 / 16, rel=0.03)
    assert timed(pp=1).bubble == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("changes", [{}, {"pp": 2, "dp": 1}], ids=str)
def test_one_rank_of_everything_exposes_only_messages(changes: dict[str, Any]) -> None:
    alone = timed(**changes).exposed
    assert alone < 0.01 * timed(**changes).total
    assert timed(**{**changes, "tp": 2}).exposed > alone


def test_zero_2_gathers_once_a_step() -> None:
    once, often = (timed(dp=8, zero=2, num_microbatches=count).exposed / count for count in (1, 16))
    assert often < 0.9 * once


def test_messages_between_nodes_are_slower() -> None:
    inside = replace(HARDWARE["h100"], gpus_per_node=16)
    given = plan(pp=16)
    near, far = (
        step_time(LLAMA, given, machine, OURS).exposed for machine in (inside, HARDWARE["h100"])
    )
    assert far > 2 * near


def test_experts_cost_what_a_token_uses_of_them() -> None:
    wide = replace(LLAMA, experts=8, top_k=2, ffn=4096)
    one = replace(LLAMA, ffn=2 * 4096)
    dense, sparse = (timed(sizes, micro_batch=8).total for sizes in (one, wide))
    assert dense < sparse < 1.5 * dense


def test_expert_parallel_exchanges_tokens() -> None:
    wide = replace(LLAMA, experts=8, top_k=2, ffn=4096)
    often = {"dp": 8, "num_microbatches": 64}
    assert timed(wide, ep=8, **often).exposed > timed(wide, ep=1, **often).exposed


def test_a_slow_host_bounds_small_steps() -> None:
    slow = replace(OURS, host_layer_s=0.1)
    time = step_time(LLAMA, plan(num_microbatches=1), HARDWARE["h100"], slow).total
    assert time > LLAMA.layers * 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "int4"}, "precision 'int4'; known: bf16, fp16, fp32, fp8"),
        ({"schedule": "zigzag", "pp": 2}, "unknown schedule 'zigzag'"),
    ],
)
def test_what_is_unknown_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        timed(**changes)


def test_unknown_software_is_refused() -> None:
    with pytest.raises(PlanError, match="unknown software 'emacs'; known are ilm_compile"):
        software_named("emacs")


def test_fp8_needs_a_device_that_has_it() -> None:
    with pytest.raises(PlanError, match="no peak FLOP/s of a100-80g for precision 'fp8'"):
        step_time(LLAMA, plan(precision="fp8"), HARDWARE["a100-80g"], OURS)


def test_a_candidate_is_cheap_enough_to_search() -> None:
    # Not a time, which a busy machine would stretch: what is asked of the machine's links.
    asked = 0

    class Counting(dict):  # type: ignore[type-arg]
        def __getitem__(self, key: str) -> Any:
            nonlocal asked
            asked += 1
            return super().__getitem__(key)

    machine = replace(HARDWARE["h100"], name="counted", links=Counting(HARDWARE["h100"].links))
    step_time(
        LLAMA,
        StepPlan(seq=2048, micro_batch=1, num_microbatches=8, tp=8, pp=4, dp=32),
        machine,
        OURS,
    )
    assert asked < 12

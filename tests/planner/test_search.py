"""The search: what it finds, in which order, and what it says of the rest."""

import re
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from ilm_compile.cost.constants import SOFTWARE
from ilm_compile.cost.hardware import HARDWARE
from ilm_compile.cost.pipeline_time import FORMS, LISTED
from ilm_compile.cost.sizes import ModelSizes
from ilm_compile.errors import PlanError
from ilm_compile.planner import Search, search
from ilm_compile.planner.space import SCHEDULES
from ilm_compile.schedule import check, schedule_of

GIB = 2**30
SMALL = ModelSizes(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256)
LARGE = ModelSizes(hidden=8192, layers=80, heads=64, kv_heads=8, ffn=28672, vocab=128256)
SPARSE = ModelSizes(
    hidden=4096, layers=32, heads=32, kv_heads=8, ffn=1536, vocab=32000, experts=64, top_k=4
)


def found(sizes: ModelSizes = SMALL, gpus: int = 64, **changes: Any) -> Search:
    given = {"tokens_per_batch": 4 * 2**20, "seq": 4096, **changes}
    return search(sizes, gpus, HARDWARE["h100"], **given)


@cache
def tight() -> Search:
    """In which much must be recomputed."""
    return found(LARGE, 32, memory=60 * GIB, tokens_per_batch=2**21)


def test_candidates_use_all_devices_fit_and_are_in_order() -> None:
    result = found()
    assert len(result.candidates) > 100
    assert all(one.plan.gpus == 64 for one in result.candidates)
    limit = HARDWARE["h100"].usable_bytes * (1 - SOFTWARE["ilm_compile"].kept_free)
    assert result.question.limit == pytest.approx(limit)
    assert all(one.memory.total <= limit for one in result.candidates)
    assert all(a.time.total <= b.time.total for a, b in pairwise(result.candidates))
    assert result.best is result.candidates[0]


@pytest.mark.parametrize("sizes", [LARGE, SPARSE], ids=["dense", "experts"])
def test_every_candidate_is_the_batch_and_a_valid_plan(sizes: ModelSizes) -> None:
    for one in found(sizes).candidates:
        plan = one.to_plan()
        assert one.plan.dp * one.plan.micro_batch * one.plan.num_microbatches == 1024
        assert plan.ranks_per_replica * (plan.dp or 1) == 64
        assert plan.num_microbatches == one.plan.num_microbatches


def test_figures_of_the_best_are_believable() -> None:
    best = found().best
    assert 0.3 < best.mfu < 0.7
    assert best.tokens_per_second_per_gpu == pytest.approx(
        4 * 2**20 / 64 / best.time.total, rel=1e-9
    )


def test_the_same_question_has_the_same_answer() -> None:
    one, other = found(), found()
    assert [c.name for c in one.candidates] == [c.name for c in other.candidates]
    assert one.rejected == other.rejected
    assert one.best.to_plan().to_json() == other.best.to_plan().to_json()


def test_names_are_unique() -> None:
    names = [one.name for one in found(SPARSE).candidates]
    assert len(set(names)) == len(names)


def test_a_large_model_needs_more_than_data_parallelism() -> None:
    plan = found(LARGE).best.plan
    assert plan.tp * plan.pp > 1 or plan.zero == 3


def test_less_memory_costs_recompute_or_ranks() -> None:
    rich, poor = found(SMALL, 8), found(SMALL, 8, memory=24 * GIB)
    assert poor.best.time.total > rich.best.time.total
    assert all(one.memory.total < 24 * GIB for one in poor.candidates)


def test_experts_get_ranks_of_their_own() -> None:
    shares = {one.plan.ep for one in found(SPARSE).candidates}
    assert {1, 8, 64} <= shares


def test_every_schedule_is_a_candidate_or_loses_in_a_line() -> None:
    result = found(LARGE)
    assert set(SCHEDULES) == set(FORMS) - {"zb_1p", "zb_2p"}
    best = result.best
    lines = {line.what.split()[1]: line.reason for line in result.why_not()[:20]}
    assert {*lines, best.plan.schedule} >= set(SCHEDULES)
    for schedule in SCHEDULES:
        assert schedule == best.plan.schedule or re.search(
            "x the time|needs |do not divide", lines[schedule]
        )


def test_what_cannot_be_the_fastest_is_not_walked_and_what_can_is() -> None:
    result = tight()
    walked = [one for one in result.candidates if one.plan.schedule in LISTED]
    assert walked
    assert len(walked) < len(result.candidates) / 4
    best = result.best
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ilm_compile.planner.explore.at_least", lambda plan, costs: 0.0)
        everything = tight.__wrapped__()
    assert everything.best.name == best.name
    assert len(everything.candidates) > len(result.candidates)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_offered_where_they_can_run(schedule: str) -> None:
    for candidate in found(SMALL, 16, memory=40 * GIB).candidates:
        plan = candidate.plan
        if plan.schedule == schedule and plan.pp <= 4 and plan.num_microbatches <= 16:
            check(schedule_of(candidate.to_plan()))


def test_each_recompute_is_a_candidate_or_loses_in_a_line() -> None:
    result = tight()
    kinds = {one.plan.recompute for one in result.candidates}
    assert kinds >= {"selective", "full", "auto"}
    what = {line.what for line in result.why_not()} | {f"with recompute={result.best.recompute}"}
    names = ("none", "selective", "25%", "50%", "75%", "100%", "auto")
    assert {f"with recompute={name}" for name in names} <= what


def test_ranks_that_choose_for_themselves_are_no_slower_and_fit() -> None:
    result = tight()
    uniform = {c.name: c for c in result.candidates if c.plan.recompute in ("selective", "full")}
    own = [one for one in result.candidates if one.plan.recompute == "auto"]
    assert own
    for one in own:
        name = one.name.split(" recompute=")[0]
        alike = [c for key, c in uniform.items() if key.startswith(f"{name} recompute=")]
        assert one.time.total <= alike[0].time.total * 1.0001
        assert one.memory.total <= result.question.limit
        assert one.to_plan().checkpoint == "auto"
        assert 0 < (one.to_plan().memory_bytes or 0) < result.question.limit


def test_selective_recompute_reaches_the_plan() -> None:
    result = tight()
    one = next(c for c in result.candidates if c.plan.recompute == "selective")
    assert (one.to_plan().checkpoint, one.to_plan().memory) == ("selective", None)


def test_a_long_sequence_is_divided() -> None:
    long = found(SMALL, 16, seq=131072, tokens_per_batch=2 * 2**20)
    assert long.best.plan.cp > 1


@pytest.mark.parametrize(
    ("sizes", "what", "reason"),
    [
        (SMALL, "tp=16", "leaves the node of 8"),
        (SMALL, "pp=64", "has more stages than 32 layers"),
        (SMALL, "cp=8", "leaves fewer than 1024 tokens of a sequence to a rank"),
        (LARGE, "tp=1 cp=1 ep=1 pp=1", "x the time"),
        (LARGE, "tp=8 cp=1 ep=1 pp=8", "x the time"),
    ],
)
def test_why_not(sizes: ModelSizes, what: str, reason: str) -> None:
    lines = [line for line in found(sizes).why_not() if line.what.startswith(what)]
    assert lines
    assert reason in lines[0].reason


def test_every_mesh_has_one_line_at_most() -> None:
    result = found(LARGE)
    lines = [line.what for line in result.why_not() if not line.what.startswith("with ")]
    meshes = [line.split(" dp=")[0] for line in lines]
    assert len(set(meshes)) == len(meshes)


def test_what_does_not_fit_says_what_it_needs() -> None:
    lines = [line.reason for line in found(LARGE, memory=30 * GIB).rejected]
    assert any(line.startswith("needs ") and "of 28.2 GiB" in line for line in lines)


def test_nothing_fits_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"on 8 x h100 fits 9\.4 of 10\.0 GiB; nearest is tp="):
        _ = found(LARGE, 8, memory=10 * GIB).best


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_batch": 5000}, "tokens_per_batch=5000 is not a multiple of seq=4096; use"),
        ({"gpus": 0}, "gpus=0; expected at least 1"),
        ({"precision": "int4"}, "precision='int4'; known are bf16"),
    ],
)
def test_a_wrong_question_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        found(**changes)


def test_more_devices_cost_no_more_candidates_than_a_search_can_rank() -> None:
    # about 60 us each: two seconds are 30,000
    assert len(found(LARGE, 1024).candidates) < 10_000

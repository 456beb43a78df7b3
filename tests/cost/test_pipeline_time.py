"""The closed forms of the schedules: equal to the simulation by events, where both exist."""

from dataclasses import replace

import pytest

from ilm_compile.cost.pipeline import Pipeline
from ilm_compile.cost.pipeline_lists import spans
from ilm_compile.cost.pipeline_time import FORMS, LISTED, form
from ilm_compile.errors import PlanError
from ilm_compile.schedule import Schedule, StageTimes, build, simulate
from ilm_compile.schedule.memory import Held, rank_moments

SIZES = [(4, 8), (8, 8), (8, 32)]
SCHEDULES = [
    ("gpipe", 1),
    ("gpipe", 2),
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("interleaved_1f1b", 4),
]
SPLIT = [("zb_h1", 1), ("zb_h2", 1), ("zb_v", 2)]
WALKED = [(name, 2) for name in LISTED]


def schedule(name: str, pp: int, microbatches: int, chunks: int) -> Schedule:
    return build(name, pp=pp, num_microbatches=microbatches, num_chunks=chunks)


def pipeline(
    pp: int, microbatches: int, chunks: int, *, last: float = 0.0, message: float = 0.0
) -> Pipeline:
    return Pipeline(
        pp=pp,
        chunks=chunks,
        num_microbatches=microbatches,
        forward=1.0,
        backward=1.2,
        weight=0.8,
        last=last,
        message=message,
    )


def simulated(plan: Schedule, given: Pipeline) -> float:
    chunks, last = given.chunks, plan.num_stages - 1
    parts = (given.forward, given.backward, given.weight)
    again = given.again or (0.0,) * given.pp
    times = [
        StageTimes(
            forward=parts[0] / chunks + given.last / 3 * (stage == last),
            backward=(parts[1] + again[plan.stage_to_rank[stage]]) / chunks
            + given.last / 3 * (stage == last),
            weight=parts[2] / chunks + given.last / 3 * (stage == last),
            message=given.message,
        )
        for stage in range(plan.num_stages)
    ]
    return simulate(plan, times).cost


@pytest.mark.parametrize(("pp", "microbatches"), SIZES)
@pytest.mark.parametrize(("name", "chunks"), SCHEDULES + SPLIT)
def test_equal_ranks_take_what_the_simulation_takes(
    name: str, chunks: int, pp: int, microbatches: int
) -> None:
    given = pipeline(pp, microbatches, chunks)
    expected = simulated(schedule(name, pp, microbatches, chunks), given)
    assert form(name).span(given) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("pp", "microbatches"), SIZES)
@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
def test_messages_take_what_the_simulation_takes(
    name: str, chunks: int, pp: int, microbatches: int
) -> None:
    given = pipeline(pp, microbatches, chunks, message=0.1)
    expected = simulated(schedule(name, pp, microbatches, chunks), given)
    assert form(name).span(given) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("pp", "microbatches"), SIZES)
@pytest.mark.parametrize(("name", "chunks"), SCHEDULES)
def test_a_head_makes_the_last_rank_the_slowest(
    name: str, chunks: int, pp: int, microbatches: int
) -> None:
    given = pipeline(pp, microbatches, chunks, last=0.6)
    expected = simulated(schedule(name, pp, microbatches, chunks), given)
    assert form(name).span(given) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("pp", "microbatches"), [*SIZES, (2, 1), (2, 40)])
@pytest.mark.parametrize(("name", "chunks"), WALKED)
def test_walked_lists_take_what_the_simulation_takes(
    name: str, chunks: int, pp: int, microbatches: int
) -> None:
    if name == "dualpipe_v" and microbatches < 2 * pp:
        microbatches = 2 * pp
    plain = pipeline(pp, microbatches, chunks)
    again = tuple(0.1 * (pp - rank) for rank in range(pp))
    given = [plain, replace(plain, last=0.6, message=0.1), replace(plain, again=again)]
    made = schedule(name, pp, microbatches, chunks)
    assert spans(name, given) == pytest.approx([simulated(made, one) for one in given], rel=0.01)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved_1f1b"])
def test_ranks_may_recompute_different_amounts(name: str) -> None:
    chunks = 2 if name == "interleaved_1f1b" else 1
    given = replace(pipeline(4, 16, chunks), again=(0.9, 0.6, 0.3, 0.0))
    expected = simulated(schedule(name, 4, 16, chunks), given)
    assert 0.99 < form(name).span(given) / expected < (1.1 if chunks > 1 else 1.03)


@pytest.mark.parametrize("name", sorted({*FORMS} - {*LISTED, "zb_v"}))
def test_one_rank_computes_without_a_bubble(name: str) -> None:
    given = pipeline(1, 4, 1, last=0.5)
    assert form(name).span(given) == pytest.approx(4 * 3.5)


@pytest.mark.parametrize(("pp", "microbatches"), SIZES)
@pytest.mark.parametrize(("name", "chunks"), SCHEDULES + SPLIT + WALKED)
def test_in_flight_is_the_peak_of_the_schedule(
    name: str, chunks: int, pp: int, microbatches: int
) -> None:
    given = pipeline(pp, microbatches, chunks)
    # What waits for its weight part is three times as large: as where all is recomputed.
    held = Held(forward=1, kept=1, backward=1, left=3, weight=3)
    for rank, moments in enumerate(rank_moments(schedule(name, pp, microbatches, chunks))):
        expected, _ = moments.peak([held] * (pp * chunks))
        pairs = form(name).in_flight(given, rank)
        assert max(a + 3 * w for a, w in pairs) == pytest.approx(expected / chunks, rel=0.15)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(PlanError, match="unknown schedule 'zigzag'; known are gpipe, 1f1b"):
        form("zigzag")

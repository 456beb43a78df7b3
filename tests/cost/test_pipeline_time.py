"""The closed forms of the schedules: equal to the simulation by events, where both exist."""

import pytest

from ilm_compile.cost.pipeline_time import FORMS, Pipeline, form
from ilm_compile.errors import PlanError
from ilm_compile.schedule import Schedule, StageTimes, build, peak_in_flight, simulate

SIZES = [(4, 8), (8, 8), (8, 32)]
SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4)]
SPLIT = [("zb_h1", 1), ("zb_h2", 1), ("zb_v", 2)]


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
    times = [
        StageTimes(
            forward=parts[0] / chunks + given.last / 3 * (stage == last),
            backward=parts[1] / chunks + given.last / 3 * (stage == last),
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


@pytest.mark.parametrize("name", FORMS)
def test_one_rank_computes_without_a_bubble(name: str) -> None:
    given = pipeline(1, 4, 1, last=0.5)
    assert form(name).span(given) == pytest.approx(4 * 3.5)


@pytest.mark.parametrize(("pp", "microbatches"), SIZES)
@pytest.mark.parametrize(("name", "chunks"), SCHEDULES + SPLIT)
def test_in_flight_is_the_peak_of_the_schedule(
    name: str, chunks: int, pp: int, microbatches: int
) -> None:
    given = pipeline(pp, microbatches, chunks)
    peaks = peak_in_flight(schedule(name, pp, microbatches, chunks))
    for rank in [0] if name.startswith("zb") else range(pp):
        expected = peaks[rank] / chunks
        if name == "zb_v" and microbatches < 2 * pp - 1:  # its list leaves out what is not there
            assert form(name).in_flight(given, rank) >= expected
        else:
            assert form(name).in_flight(given, rank) == pytest.approx(expected)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(PlanError, match="unknown schedule 'zigzag'; known are gpipe, 1f1b"):
        form("zigzag")

"""The simulator, against closed formulas, the Zero Bubble paper, and lists worked out by hand."""

import math

import pytest

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule import (
    Action,
    Schedule,
    StageTimes,
    build,
    forward_only,
    peak_in_flight,
    simulate,
)
from tests.schedule.rows import RANK0, RANK1, schedule_of

# (name, chunks)
ALL = [
    ("gpipe", 1),
    ("gpipe", 2),
    ("1f1b", 1),
    ("interleaved_1f1b", 2),
    ("zb_h1", 1),
    ("zb_h2", 1),
    ("zb_v", 2),
]
all_schedules = pytest.mark.parametrize(("name", "chunks"), ALL)
overlaps = pytest.mark.parametrize("overlap", [True, False])


def schedule(name: str, pp: int, m: int, chunks: int = 1) -> Schedule:
    return build(name, pp=pp, num_microbatches=m, num_chunks=chunks)


def uneven(num_stages: int) -> list[StageTimes]:
    return [
        StageTimes(forward=1.0 + 0.3 * s, backward=1.7 - 0.1 * s, weight=0.5 + s, message=0.2)
        for s in range(num_stages)
    ]


F, B, W = 5.0, 4.0, 3.0
# What the longest rank idles where messages take no time, in units of p - 1.
BUBBLES = {
    ("gpipe", 1): F + B + W,
    ("1f1b", 1): F + B + W,
    ("interleaved_1f1b", 2): (F + B + W) / 2,
    ("zb_h1", 1): F + B - W,
    ("zb_h2", 1): F + B - 2 * W,
}


@pytest.mark.parametrize(("pp", "m"), [(1, 3), (2, 4), (4, 8), (4, 12), (8, 16)])
@pytest.mark.parametrize(("name", "chunks"), BUBBLES)
def test_the_bubble_is_that_of_the_formula(name, chunks, pp, m):
    built = schedule(name, pp, m, chunks)
    times = StageTimes(forward=F / chunks, backward=B / chunks, weight=W / chunks)
    result = simulate(built, [times] * built.num_stages)
    assert result.cost == pytest.approx(m * (F + B + W) + (pp - 1) * BUBBLES[name, chunks])
    assert result.bubbles == pytest.approx((1 - m * (F + B + W) / result.cost,) * pp)


@pytest.mark.parametrize(("name", "chunks"), [("zb_h2", 1), ("zb_v", 2)])
def test_no_rank_idles_once_begun_where_all_parts_take_the_same_time(name, chunks):
    built = schedule(name, 4, 8, chunks)
    times = StageTimes(forward=2 / chunks, backward=2 / chunks, weight=2 / chunks)
    result = simulate(built, [times] * built.num_stages)
    assert result.rank_times == (48, 48, 48, 48)
    assert result.bubbles == (0, 0, 0, 0)
    assert result.makespan == 48 + 3 * 2 / chunks


# T_F, T_B, T_W, T_comm in ms of Table 9, and the bubble rates of 1F1B, ZB-H1 and ZB-H2 of Table 5
# (arXiv 2401.10241). The four rows that are left out take seconds each; they agree as well.
PAPER = {
    "1.5B p=8 m=24": (8, 24, 18.522, 18.086, 9.337, 0.601, 0.2431, 0.1585, 0.1083),
    "1.5B p=8 m=32": (8, 32, 18.513, 18.086, 9.331, 0.626, 0.1985, 0.1242, 0.0837),
    "1.5B p=8 m=64": (8, 64, 18.546, 18.097, 9.321, 0.762, 0.1240, 0.0674, 0.0444),
    "6.2B p=8 m=24": (8, 24, 29.718, 29.444, 19.927, 0.527, 0.2347, 0.1323, 0.0698),
    "6.2B p=8 m=32": (8, 32, 29.802, 29.428, 19.530, 0.577, 0.1898, 0.1045, 0.0559),
    "6.2B p=8 m=64": (8, 64, 29.935, 29.621, 19.388, 0.535, 0.1091, 0.0554, 0.0294),
    "14.6B p=16 m=48": (16, 48, 11.347, 11.248, 8.132, 0.377, 0.2552, 0.1397, 0.0672),
    "28.3B p=32 m=96": (32, 96, 10.419, 10.207, 7.715, 0.408, 0.2646, 0.1421, 0.0641),
}


@pytest.mark.parametrize("row", PAPER)
def test_the_rates_of_the_zero_bubble_paper(row):
    p, m, f, b, w, comm, *published = PAPER[row]
    times = StageTimes(forward=f, backward=b, weight=w, message=comm)
    costs = [simulate(schedule(n, p, m), [times] * p).cost for n in ("1f1b", "zb_h1", "zb_h2")]
    rates = [1 - m * (f + b + w) / cost for cost in costs]
    assert rates == pytest.approx(published, abs=5.1e-5)  # the table has four digits


@overlaps
@all_schedules
def test_every_action_keeps_the_rules(name, chunks, overlap):
    """One compute at a time, in the order of the list, none before its message is there."""
    built = schedule(name, 3, 6, chunks)
    times = uneven(built.num_stages)
    spans = simulate(built, times, overlap=overlap).spans
    assert set(spans) == {action for row in built.actions for action in row}
    for row in built.actions:
        free = 0.0
        for action in row:
            assert spans[action].start >= free
            if action.is_compute:
                for receive in built.receives(action):
                    assert spans[action].start >= spans[receive].stop
                free = spans[action].stop
            elif action.is_send:
                assert spans[action].stop == spans[action].start + times[action.stage].message
                assert spans[action.partner].stop >= spans[action].stop
                if not overlap:
                    assert spans[action].start >= spans[action.partner].start
                    free = spans[action].stop


@overlaps
@all_schedules
def test_no_action_could_start_earlier(name, chunks, overlap):
    built = schedule(name, 3, 6, chunks)
    spans = simulate(built, uneven(built.num_stages), overlap=overlap).spans
    for row in built.actions:
        holding = [a for a in row if a.is_compute or (a.is_send and not overlap)]
        for before, action in zip([None, *holding], holding, strict=False):
            reasons = [spans[before].stop if before else 0.0]
            reasons += [spans[receive].stop for receive in built.receives(action)]
            if action.is_send:
                reasons.append(spans[action.partner].start)
            assert spans[action].start == max(reasons)


def test_a_blocking_send_holds_its_rank():
    times = [StageTimes(forward=2, backward=3, message=1)] * 2
    spans = simulate(schedule_of(RANK0, RANK1), times, overlap=False).spans
    # Rank 1 posts its second receive after its first forward, which it begins at 3.
    assert spans[Action.parse("0SEND_F0")] == (2, 3)
    assert spans[Action.parse("0F1")] == (3, 5)
    assert spans[Action.parse("0SEND_F1")] == (5, 6)
    assert spans[Action.parse("1B0")] == (5, 8)
    assert spans[Action.parse("1SEND_B0")] == (8, 9)
    assert spans[Action.parse("1F1")] == (9, 11)


def test_a_send_that_overlaps_holds_no_rank():
    times = [StageTimes(forward=2, backward=3, message=1)] * 2
    spans = simulate(schedule_of(RANK0, RANK1), times).spans
    assert spans[Action.parse("0F1")] == (2, 4)
    assert spans[Action.parse("1RECV_F0")] == (0, 3)
    assert spans[Action.parse("1F1")] == (8, 10)
    assert spans[Action.parse("0B0")] == (9, 12)


@all_schedules
def test_activations_in_flight_peak_where_they_are_counted(name, chunks):
    built = schedule(name, 4, 9 if name != "interleaved_1f1b" else 8, chunks)
    result = simulate(built, uneven(built.num_stages))
    for rank, peak in enumerate(peak_in_flight(built)):
        line = result.in_flight(rank)
        assert max(count for _, count in line) == peak
        assert line[-1][1] == 0
        assert [time for time, _ in line] == sorted(time for time, _ in line)


def test_activations_are_freed_by_the_weight_part():
    times = StageTimes(forward=1, backward=2, weight=3)
    split = simulate(schedule_of("0F0 0B0 0W0", num_microbatches=1), [times])
    whole = simulate(schedule_of("0F0 0B0", num_microbatches=1), [times])
    assert split.in_flight(0) == whole.in_flight(0) == [(0, 1), (6, 0)]


def test_inference_has_only_forwards():
    result = simulate(forward_only(build("1f1b", pp=2, num_microbatches=3)), uneven(2))
    assert result.busy == pytest.approx((3.0, 3.9))


def test_the_same_arguments_give_the_same_simulation():
    built = schedule("zb_h2", 4, 8)
    assert simulate(built, uneven(4)) == simulate(built, uneven(4))


def test_an_invalid_schedule_is_refused():
    with pytest.raises(ScheduleError, match="never runs 0SEND_F0"):
        simulate(build("1f1b", pp=2, num_microbatches=2).compute_only(), uneven(2))


def test_times_are_wanted_for_every_stage():
    with pytest.raises(ScheduleError, match="has 2 stages, got the times of 3"):
        simulate(build("1f1b", pp=2, num_microbatches=2), uneven(3))


@pytest.mark.parametrize("field", ["forward", "backward", "weight", "message"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_times_are_finite_and_not_negative(field, value):
    with pytest.raises(ScheduleError, match=f"the {field} time of a stage .* got {value}"):
        StageTimes(**{"forward": 1.0, "backward": 1.0, field: value})

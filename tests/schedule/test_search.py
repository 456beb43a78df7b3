"""A schedule found for given times, and schedules read from a file."""

import random

import pytest

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule import (
    StageTimes,
    build,
    check,
    known_schedules,
    peak_in_flight,
    search,
    simulate,
    stage_ranks,
)


def uneven(num_stages):
    generator = random.Random(1)
    return [
        StageTimes(
            forward=generator.uniform(0.5, 1.5),
            backward=generator.uniform(0.5, 1.5),
            weight=generator.uniform(0.3, 1.0),
            message=0.1,
        )
        for _ in range(num_stages)
    ]


def named(limit, **sizes):
    """The schedules of these sizes that keep to the limit."""
    for name in known_schedules():
        try:
            schedule = build(name, **sizes)
            check(schedule)
        except ScheduleError:
            continue
        if schedule.num_stages == sizes["pp"] * sizes["num_chunks"] and (
            max(peak_in_flight(schedule)) <= limit
        ):
            yield schedule


@pytest.mark.parametrize(
    ("pp", "chunks", "m", "limit"),
    [
        (1, 1, 2, 1),
        (3, 1, 5, 3),
        (4, 1, 8, 6),
        (2, 2, 4, 4),
        (3, 2, 5, 2),
        (2, 3, 4, 3),
        (4, 1, 2, 9),
    ],
)
def test_keeps_to_the_limit_and_is_no_slower_than_any_named_schedule(pp, chunks, m, limit):
    times = uneven(pp * chunks)
    found = search(times, pp=pp, num_microbatches=m, max_in_flight=limit)
    check(found)
    assert (found.num_ranks, found.num_stages, found.num_microbatches) == (pp, pp * chunks, m)
    assert max(peak_in_flight(found)) <= limit
    others = named(limit, pp=pp, num_chunks=chunks, num_microbatches=m)
    spans = [simulate(schedule, times).makespan for schedule in others]
    assert simulate(found, times).makespan <= min(spans, default=float("inf"))
    assert found == search(times, pp=pp, num_microbatches=m, max_in_flight=limit)


@pytest.mark.parametrize(("pp", "chunks", "limit"), [(4, 1, 6), (3, 2, 7)])
def test_uneven_stages_have_a_faster_schedule_than_the_named(pp, chunks, limit):
    times = uneven(pp * chunks)
    found = simulate(search(times, pp=pp, num_microbatches=8, max_in_flight=limit), times)
    every = named(limit, pp=pp, num_chunks=chunks, num_microbatches=8)
    assert found.makespan < min(simulate(each, times).makespan for each in every)


def test_a_third_of_the_memory_is_enough_for_two_chunks():
    """Less than any named schedule needs."""
    times = uneven(10)
    assert not list(named(4, pp=5, num_chunks=2, num_microbatches=8))
    assert max(peak_in_flight(search(times, pp=5, num_microbatches=8, max_in_flight=4))) <= 4


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        (3, {}, "expected the times of a multiple of pp=2 stages"),
        (2, {"num_microbatches": 0}, "at least one micro-batch"),
        (4, {"max_in_flight": 1}, "no room for one micro-batch in each of the 2 stages"),
    ],
)
def test_counts_that_do_not_fit_are_refused(stages, options, message):
    with pytest.raises(ScheduleError, match=message):
        search(uneven(stages), **{"pp": 2, "num_microbatches": 2, **options})


@pytest.mark.parametrize("messages", [True, False])
def test_a_file_is_a_schedule_by_name(messages, tmp_path):
    path = str(tmp_path / "found.csv")
    made = build("zb_v", pp=2, num_microbatches=3, num_chunks=2)
    (made if messages else made.compute_only()).to_csv(path)
    read = build(path, pp=2, num_microbatches=3, num_chunks=2)
    assert (read.name, read.actions) == (path, made.actions)
    assert stage_ranks(path, pp=2, num_stages=4) == (0, 1, 1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "no rank runs a forward of stage 0"),
        ("0F0,0B0\n", "has 1 ranks, 1 micro-batches and 1 stages, but the plan has pp=2"),
        ("0F0,0X0\n", "'0X0' is not a schedule action"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(text, message, tmp_path):
    path = tmp_path / "wrong.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ScheduleError, match=message):
        build(str(path), pp=2, num_microbatches=1)

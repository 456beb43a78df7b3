"""Cuts and recompute chosen together: within memory, and no worse than any other choice tried."""

from itertools import combinations, pairwise

import pytest

from ilm_compile.rewrite.balance import balance
from ilm_compile.rewrite.stage_choice import Chooser, Part, StageChoice, Unit
from ilm_compile.schedule import build, peak_in_flight
from ilm_compile.schedule.memory import rank_moments

BLOCKS = 8
HEAD = 3.0  # seconds, as long as three blocks


def units(head: float = HEAD) -> list[Unit]:
    def unit(region: int, seconds: float, saved: float, kept: float) -> Unit:
        part = Part(
            region=region,
            can_recompute=region < BLOCKS,
            forward=seconds,
            backward=seconds,
            weight=seconds,
            saved=saved,
            kept=kept,
        )
        return Unit(parts=(part,), static=10.0, sent=0.1)

    return [*(unit(i, 1.0, 4.0, 1.0) for i in range(BLOCKS)), unit(BLOCKS, head, 2.0, 2.0)]


def chooser(
    memory: float, *, schedule: str = "1f1b", pp: int = 4, m: int = 8, chunks: int = 1
) -> Chooser:
    return Chooser(
        units(),
        lambda count: build(schedule, pp=pp, num_microbatches=count, num_chunks=chunks),
        num_microbatches=m,
        memory=memory,
    )


def uniform(found: Chooser, pp: int, *, recompute: bool) -> StageChoice:
    """Blocks spread evenly, all or nothing recomputed, as others do it."""
    blocks = frozenset(range(BLOCKS)) if recompute else frozenset()
    return found.with_recompute(tuple(balance([1.0] * (BLOCKS + 1), pp)), blocks)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("rank", range(4))
def test_moments_hold_the_most_that_is_in_flight(schedule: str, rank: int) -> None:
    made = build(schedule, pp=4, num_microbatches=6)
    ones = [1.0] * made.num_stages
    nothing = [0.0] * made.num_stages
    assert rank_moments(made)[rank].peak(ones, nothing)[0] == peak_in_flight(made)[rank]


def test_moments_of_two_chunks_count_each_stage() -> None:
    made = build("interleaved_1f1b", pp=2, num_microbatches=4, num_chunks=2)
    first = rank_moments(made)[0]
    assert first.stages == (0, 2)
    both, _ = first.peak([1.0, 0.0, 1.0, 0.0], [0.0] * 4)
    lower, _ = first.peak([1.0, 0.0, 0.0, 0.0], [0.0] * 4)
    assert both == peak_in_flight(made)[0]
    assert 0 < lower < both


def test_what_works_in_a_backward_is_in_the_peak() -> None:
    made = build("1f1b", pp=2, num_microbatches=4)
    first = rank_moments(made)[0]
    assert first.peak([1.0, 1.0], [5.0, 7.0])[0] == 2 + 5


def test_with_room_nothing_is_recomputed() -> None:
    found = chooser(memory=1e9).best()
    assert found.recomputed == frozenset()
    assert found.too_much == 0


@pytest.mark.parametrize("memory", [60, 50, 45, 40, 38])
def test_choice_fits_and_beats_uniform_recompute(memory: float) -> None:
    under = chooser(memory)
    found = under.best()
    plain = uniform(under, 4, recompute=True)
    assert max(found.peaks) <= memory
    assert plain.too_much > 0 or found.seconds <= plain.seconds


@pytest.mark.parametrize("memory", [1e9, 50, 38])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
def test_no_other_cuts_are_better(schedule: str, memory: float) -> None:
    chunks = 2 if schedule == "interleaved_1f1b" else 1
    under = chooser(memory, schedule=schedule, pp=2, m=4, chunks=chunks)
    places = combinations(range(1, BLOCKS + 1), 2 * chunks - 1)
    best = min(map(under.at, places), key=lambda choice: choice.order)
    found = under.best()
    assert found.too_much == best.too_much
    assert found.seconds == pytest.approx(best.seconds, rel=0.01)


def test_last_stage_recomputes_less_than_the_first() -> None:
    found = chooser(memory=44).best()
    stages = [0, *found.cuts, BLOCKS + 1]
    counts = [len(found.recomputed & set(range(a, b))) for a, b in pairwise(stages)]
    assert counts[0] > 0
    assert counts[-1] == 0


def test_too_little_memory_says_how_much_is_missing() -> None:
    found = chooser(memory=20).best()
    assert found.too_much == pytest.approx(max(found.peaks) - 20)
    assert found.recomputed


def test_many_micro_batches_take_as_long_as_simulated() -> None:
    few, many = chooser(50, m=8), chooser(50, m=100)
    assert many.simulated < 100
    longer = Chooser(
        units(), lambda m: build("1f1b", pp=4, num_microbatches=m), num_microbatches=100, memory=50
    )
    longer.schedule, longer.simulated, longer.rest = (
        build("1f1b", pp=4, num_microbatches=100),
        100,
        0,
    )
    cuts = few.best().cuts
    assert many.at(cuts).seconds == pytest.approx(longer.at(cuts).seconds, rel=0.01)

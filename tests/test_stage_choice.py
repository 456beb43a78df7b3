"""Cuts and recompute chosen together: within memory, and no worse than any other choice tried."""

from collections.abc import Sequence
from itertools import accumulate, combinations, pairwise

import pytest

from ilm_compile.rewrite.balance import balance
from ilm_compile.rewrite.stage_choice import (
    IN_PART,
    NOTHING,
    WHOLE,
    Chooser,
    Part,
    StageChoice,
    Unit,
    Way,
)
from ilm_compile.schedule import Action, Kind, build, peak_in_flight
from ilm_compile.schedule.memory import Held, rank_moments

BLOCKS = 8
HEAD = 3.0  # seconds, as long as three blocks


def units(head: float = HEAD) -> list[Unit]:
    def unit(region: int, seconds: float, saved: float, kept: float) -> Unit:
        ways = {
            NOTHING: Way(held=Held(forward=saved, kept=saved, backward=saved)),
            IN_PART: Way(held=Held(forward=saved, kept=3.0, backward=saved), again=0.2),
            WHOLE: Way(held=Held(forward=kept, kept=kept, backward=kept + saved), again=seconds),
        }
        part = Part(
            region=region,
            forward=seconds,
            backward=seconds,
            weight=seconds,
            ways=ways if region < BLOCKS else {NOTHING: ways[NOTHING]},
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
    ways = dict.fromkeys(range(BLOCKS), WHOLE) if recompute else {}
    return found.with_ways(tuple(balance([1.0] * (BLOCKS + 1), pp)), ways)


def keeps(size: float, working: float = 0.0) -> Held:
    return Held(forward=size, kept=size, backward=size + working)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("rank", range(4))
def test_moments_hold_the_most_that_is_in_flight(schedule: str, rank: int) -> None:
    made = build(schedule, pp=4, num_microbatches=6)
    ones = [keeps(1.0)] * made.num_stages
    assert rank_moments(made)[rank].peak(ones)[0] == peak_in_flight(made)[rank]


def test_moments_of_two_chunks_count_each_stage() -> None:
    made = build("interleaved_1f1b", pp=2, num_microbatches=4, num_chunks=2)
    first = rank_moments(made)[0]
    assert first.stages == (0, 2)
    both, _ = first.peak([keeps(1.0), Held(), keeps(1.0), Held()])
    lower, _ = first.peak([keeps(1.0), Held(), Held(), Held()])
    assert both == peak_in_flight(made)[0]
    assert 0 < lower < both


def test_what_works_in_a_backward_is_in_the_peak() -> None:
    made = build("1f1b", pp=2, num_microbatches=4)
    first = rank_moments(made)[0]
    assert first.peak([keeps(1.0, working=5.0), keeps(1.0, working=7.0)])[0] == 2 + 5


def test_what_waits_for_its_weight_part_is_in_the_peak() -> None:
    made = build("zb_h1", pp=2, num_microbatches=4)
    waiting = Held(left=1.0, weight=1.0)
    most = max(rank.peak([waiting, waiting])[0] for rank in rank_moments(made))
    assert most == max(
        accumulate_most(made.actions[rank], Kind.B, Kind.W) for rank in range(made.num_ranks)
    )


def accumulate_most(row: Sequence[Action], makes: Kind, frees: Kind) -> int:
    steps = ((action.kind is makes) - (action.kind is frees) for action in row)
    return max(accumulate(steps))


def test_parts_are_one_after_the_other_and_backwards_again() -> None:
    first = Held(forward=5, kept=2, backward=6, left=1, weight=3)
    last = Held(forward=4, kept=3, backward=9, left=2, weight=4)
    assert Held.together([first, last]) == Held(
        forward=2 + 4, kept=2 + 3, backward=2 + 9, left=1 + 2, weight=1 + 4
    )


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

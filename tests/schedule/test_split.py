import re

import pytest

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule import StageTimes, build, check, peak_in_flight, simulate, stage_ranks
from tests.schedule.rows import texts
from tests.schedule.torch_schedules import looped_order

CHUNKS = {"zb_h1": 1, "zb_h2": 1, "zb_v": 2, "dualpipe_v": 2, "v_half": 2, "v_min": 2}
IN_V = [name for name, chunks in CHUNKS.items() if chunks == 2]
SIZES = [(name, pp, m) for name in CHUNKS for pp in (1, 2, 3, 4, 8) for m in (1, 2, 3, 7, 8, 20)]


@pytest.mark.parametrize(("name", "pp", "m"), SIZES)
def test_built_schedule_is_valid(name, pp, m):
    schedule = build(name, pp=pp, num_microbatches=m, num_chunks=CHUNKS[name])
    check(schedule)
    assert (schedule.num_ranks, schedule.num_microbatches) == (pp, m)
    assert schedule.num_stages == pp * CHUNKS[name]
    assert schedule.stage_to_rank == stage_ranks(name, pp=pp, num_stages=schedule.num_stages)
    assert sum(len(row) for row in schedule.compute_only().actions) == 3 * m * schedule.num_stages


GOLDEN = {
    "zb_h1": [
        "0F0 0F1 0B0 0W0 0F2 0B1 0W1 0F3 0B2 0W2 0B3 0W3",
        "1F0 1B0 1F1 1B1 1W0 1F2 1B2 1W1 1F3 1B3 1W2 1W3",
    ],
    "zb_h2": [
        "0F0 0F1 0F2 0B0 0W0 0F3 0B1 0W1 0B2 0W2 0B3 0W3",
        "1F0 1B0 1F1 1B1 1F2 1B2 1W0 1F3 1B3 1W1 1W2 1W3",
    ],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_small_schedules_action_by_action(name):
    assert texts(build(name, pp=2, num_microbatches=4).compute_only()) == GOLDEN[name]


def of_torch(class_name: str, **sizes: int) -> list[str]:
    """Its rows in our letters: its B is B and W, its I our B, and (0F3;7B1)OVERLAP_F_B two."""
    rows = looped_order(class_name, **sizes)
    rows = [re.sub(r"\((\w+);(\w+)\)OVERLAP_F_B", r"\1 \2", row) for row in rows]
    rows = [re.sub(r"(\d+)B(\d+)", r"\1I\2 \1W\2", row) for row in rows]
    return [row.replace("I", "B") for row in rows]


@pytest.mark.parametrize(
    ("name", "class_name", "pp", "m"),
    [
        *(("zb_v", "ScheduleZBVZeroBubble", *s) for s in ((1, 1), (1, 4), (2, 1), (2, 3), (3, 4))),
        *(("zb_v", "ScheduleZBVZeroBubble", *s) for s in ((4, 7), (4, 12))),
        *(("dualpipe_v", "ScheduleDualPipeV", *s) for s in ((1, 2), (2, 4), (2, 9), (3, 6))),
        *(("dualpipe_v", "ScheduleDualPipeV", *s) for s in ((4, 8), (5, 13), (8, 16))),
    ],
)
def test_computes_in_the_order_of_torch(name, class_name, pp, m):
    sizes = {"pp": pp, "num_microbatches": m, "num_chunks": 2}
    assert texts(build(name, **sizes).compute_only()) == of_torch(class_name, **sizes)


@pytest.mark.parametrize("name", IN_V)
def test_the_stages_turn_on_the_last_rank(name):
    schedule = build(name, pp=3, num_microbatches=2, num_chunks=2)
    assert schedule.stage_to_rank == (0, 1, 2, 2, 1, 0)


# Of what the first rank of 1F1B holds, counted in halves of a rank: pp micro-batches. The bubble in
# forwards of half a rank, where 1F1B has 6 (pp - 1).
PAPER = {
    "zb_v": (lambda pp: pp, lambda pp: 0),
    "dualpipe_v": (lambda pp: pp + 0.5, lambda pp: pp - 1),
    "v_half": (lambda pp: (pp + 2) // 2, lambda pp: max(3, 3 * pp - 4)),
    "v_min": (lambda pp: (pp + 4) // 3, lambda pp: 4 * pp - 5 + 2 * (pp % 3 == 0)),
}


@pytest.mark.parametrize(
    ("name", "pp"),
    [
        *((name, pp) for name in ("v_half", "v_min") for pp in range(2, 17)),
        *((name, pp) for name in ("zb_v", "dualpipe_v") for pp in (2, 3, 4, 8)),
    ],
)
def test_keeps_and_idles_as_the_papers_say(name, pp):
    """Where F, B and W take the same time; the bubble is the same for any further micro-batches."""
    m = 2 * pp + pp % 2
    schedule = build(name, pp=pp, num_microbatches=m, num_chunks=2)
    check(schedule)
    held, bubble = PAPER[name]
    times = [StageTimes(forward=1, backward=1, weight=1)] * (2 * pp)
    assert max(peak_in_flight(schedule)) == 2 * held(pp)
    assert simulate(schedule, times).cost == 6 * m + bubble(pp)


@pytest.mark.parametrize("m", [1, 3, 4, 7, 20])
@pytest.mark.parametrize(("name", "most"), [("zb_h1", 4), ("zb_h2", 7)])
def test_every_rank_keeps_as_many_activations_as_the_paper_says(name, most, m):
    schedule = build(name, pp=4, num_microbatches=m)
    assert peak_in_flight(schedule) == (min(m, most),) * 4


@pytest.mark.parametrize("name", ["zb_h1", "zb_h2"])
def test_chunks_are_refused(name):
    with pytest.raises(ScheduleError, match=f"'{name}' runs one chunk per rank, got num_chunks=2"):
        build(name, pp=2, num_microbatches=4, num_chunks=2)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("name", IN_V)
def test_two_chunks_are_wanted(name, chunks):
    with pytest.raises(ScheduleError, match=f"'{name}' .* two chunks .*={chunks}; use 2"):
        build(name, pp=2, num_microbatches=4, num_chunks=chunks)

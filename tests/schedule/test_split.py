import pytest

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule import build, check, peak_in_flight, stage_ranks
from tests.schedule.rows import texts
from tests.schedule.torch_schedules import looped_order

CHUNKS = {"zb_h1": 1, "zb_h2": 1, "zb_v": 2}
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


@pytest.mark.parametrize(("pp", "m"), [(1, 1), (1, 4), (2, 1), (2, 3), (3, 4), (4, 7), (4, 12)])
def test_zb_v_computes_in_the_order_of_torch(pp, m):
    sizes = {"pp": pp, "num_microbatches": m, "num_chunks": 2}
    # What torch writes I is B here: the part of the backward that gives the input's gradient.
    expected = [r.replace("I", "B") for r in looped_order("ScheduleZBVZeroBubble", **sizes)]
    assert texts(build("zb_v", **sizes).compute_only()) == expected


def test_zb_v_turns_on_the_last_rank():
    schedule = build("zb_v", pp=3, num_microbatches=2, num_chunks=2)
    assert schedule.stage_to_rank == (0, 1, 2, 2, 1, 0)


def test_zb_v_keeps_as_many_activations_as_the_paper_says():
    schedule = build("zb_v", pp=4, num_microbatches=7, num_chunks=2)
    assert peak_in_flight(schedule) == (2 * 4,) * 4  # of half a rank each


@pytest.mark.parametrize("m", [1, 3, 4, 7, 20])
@pytest.mark.parametrize(("name", "most"), [("zb_h1", 4), ("zb_h2", 7)])
def test_every_rank_keeps_as_many_activations_as_the_paper_says(name, most, m):
    schedule = build(name, pp=4, num_microbatches=m)
    assert peak_in_flight(schedule) == (min(m, most),) * 4


@pytest.mark.parametrize("option", ["pp", "num_microbatches", "num_chunks"])
def test_sizes_below_one_are_refused(option):
    sizes = {"pp": 2, "num_microbatches": 2, "num_chunks": 1, option: 0}
    with pytest.raises(ScheduleError, match=f"'zb_h1': {option} must be at least 1, got 0"):
        build("zb_h1", **sizes)


@pytest.mark.parametrize("name", ["zb_h1", "zb_h2"])
def test_chunks_are_refused(name):
    with pytest.raises(ScheduleError, match=f"'{name}' runs one chunk per rank, got num_chunks=2"):
        build(name, pp=2, num_microbatches=4, num_chunks=2)


@pytest.mark.parametrize("chunks", [1, 3])
def test_zb_v_wants_two_chunks(chunks):
    with pytest.raises(ScheduleError, match=f"'zb_v' .* two chunks .*={chunks}; use 2"):
        build("zb_v", pp=2, num_microbatches=4, num_chunks=chunks)

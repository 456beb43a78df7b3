import random
from unittest import mock

import pytest

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule import (
    Action,
    Kind,
    Schedule,
    build,
    builders,
    check,
    forward_only,
    peak_in_flight,
    register_schedule,
)
from tests.schedule.rows import texts
from tests.schedule.torch_schedules import looped_order, single_order

# (name, pp, num_microbatches, num_chunks), with fewer micro-batches than ranks, as many, more, and
# more but not a multiple.
SIZES = [
    *(
        ("gpipe", pp, m, v)
        for pp in (1, 2, 3, 4, 8)
        for m in (1, 2, 3, 4, 7, 8, 20)
        for v in (1, 2)
    ),
    *(("1f1b", pp, m, 1) for pp in (1, 2, 3, 4, 8) for m in (1, 2, 3, 4, 7, 8, 20)),
    *(
        ("interleaved_1f1b", pp, m, v)
        for pp in (1, 2, 3, 4, 8)
        for m in (1, 2, 3, 4, 6, 8, 12, 16)
        for v in (2, 3)
        if m % max(1, m // pp) == 0
    ),
]
all_sizes = pytest.mark.parametrize(("name", "pp", "m", "chunks"), SIZES)


def v_shape(*, pp, num_microbatches, num_chunks):
    """Two stages per rank, down the ranks and up again."""
    for rank in range(pp):
        stages = (rank, 2 * pp - 1 - rank)
        forwards = [Action(s, Kind.F, i) for s in stages for i in range(num_microbatches)]
        yield [*forwards, *(Action(a.stage, Kind.B, a.microbatch) for a in forwards[::-1])]


def backward_first(*, pp, num_microbatches, num_chunks):
    yield [Action(0, Kind.B, 0), Action(0, Kind.F, 0)]


def wrong_rank(*, pp, num_microbatches, num_chunks):
    yield [Action(0, Kind.F, 0), Action(0, Kind.B, 0), Action(0, Kind.F, 1)]
    yield [Action(0, Kind.B, 1)]


@pytest.fixture(scope="module", autouse=True)
def registered():
    """Schedules of one's own, known only while the tests of this module run."""
    with mock.patch.multiple(
        builders, _BUILDERS=dict(builders._BUILDERS), _PLACEMENTS=dict(builders._PLACEMENTS)
    ):
        register_schedule("test_v_shape")(v_shape)
        register_schedule("test_backward_first")(backward_first)
        register_schedule("test_wrong_rank")(wrong_rank)
        yield


def runs_with_everything_blocking(schedule: Schedule) -> bool:
    """Whether all lists end when a receive, too, holds its rank until the message is there."""
    rows = [list(row) for row in schedule.actions]
    progress = True
    while progress:
        progress = False
        for row in rows:
            while row and row[0].is_compute:
                row.pop(0)
                progress = True
            if row and row[0].is_send:
                other = rows[schedule.peer(row[0])]
                if other and other[0] == row[0].partner:
                    row.pop(0)
                    other.pop(0)
                    progress = True
    return not any(rows)


@all_sizes
def test_built_schedule_is_valid(name, pp, m, chunks):
    schedule = build(name, pp=pp, num_microbatches=m, num_chunks=chunks)
    check(schedule)
    assert schedule.num_ranks == pp
    assert schedule.num_microbatches == m
    assert schedule.stage_to_rank == tuple(stage % pp for stage in range(pp * chunks))


@all_sizes
def test_built_schedule_runs_even_if_receives_block_too(name, pp, m, chunks):
    schedule = build(name, pp=pp, num_microbatches=m, num_chunks=chunks)
    assert runs_with_everything_blocking(schedule)
    assert runs_with_everything_blocking(forward_only(schedule))


@all_sizes
def test_forward_only_is_valid_and_keeps_the_order(name, pp, m, chunks):
    schedule = build(name, pp=pp, num_microbatches=m, num_chunks=chunks)
    inference = forward_only(schedule)
    check(inference)
    for row, full in zip(inference.compute_only().actions, schedule.actions, strict=True):
        assert list(row) == [action for action in full if action.kind is Kind.F]


def test_random_sizes_are_valid_or_refused_by_name():
    rng = random.Random(0)
    num_built = 0
    for _ in range(150):
        name = rng.choice(["gpipe", "1f1b", "interleaved_1f1b"])
        pp, m, chunks = rng.randint(1, 10), rng.randint(1, 30), rng.randint(1, 4)
        fits = {
            "gpipe": True,
            "1f1b": chunks == 1,
            "interleaved_1f1b": chunks > 1 and m % max(1, m // pp) == 0,
        }
        if fits[name]:
            schedule = build(name, pp=pp, num_microbatches=m, num_chunks=chunks)
            check(schedule)
            check(forward_only(schedule))
            num_built += 1
        else:
            with pytest.raises(ScheduleError, match=f"'{name}'.*; use "):
                build(name, pp=pp, num_microbatches=m, num_chunks=chunks)
    assert num_built > 60


GOLDEN = {
    ("gpipe", 2, 2, 1): [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1",
    ],
    ("1f1b", 1, 3, 1): ["0F0 0B0 0F1 0B1 0F2 0B2"],
    ("1f1b", 2, 4, 1): [
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0F2 0SEND_F2 0RECV_B1 0B1 "
        "0F3 0SEND_F3 0RECV_B2 0B2 0RECV_B3 0B3",
        "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1RECV_F2 1SEND_B1 1F2 "
        "1B2 1RECV_F3 1SEND_B2 1F3 1B3 1SEND_B3",
    ],
    ("interleaved_1f1b", 1, 2, 2): ["0F0 1F0 1B0 0F1 0B0 1F1 1B1 0B1"],
    ("interleaved_1f1b", 2, 2, 2): [
        "0F0 0SEND_F0 0F1 0SEND_F1 2RECV_F0 2F0 2SEND_F0 2RECV_F1 2F1 2SEND_F1 "
        "2RECV_B0 2B0 2SEND_B0 2RECV_B1 2B1 2SEND_B1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1RECV_F1 1SEND_F0 1F1 3RECV_F0 1SEND_F1 3F0 3RECV_F1 3B0 "
        "3SEND_B0 3F1 3B1 1RECV_B0 3SEND_B1 1B0 1RECV_B1 1SEND_B0 1B1 1SEND_B1",
    ],
}


@pytest.mark.parametrize("sizes", GOLDEN, ids=str)
def test_small_schedules_action_by_action(sizes):
    name, pp, m, chunks = sizes
    built = build(name, pp=pp, num_microbatches=m, num_chunks=chunks)
    assert texts(built) == GOLDEN[sizes]


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("m", [1, 2, 4, 5, 8])
@pytest.mark.parametrize(
    ("name", "torch_name"), [("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")]
)
def test_computes_in_the_order_of_torch(name, torch_name, pp, m):
    schedule = build(name, pp=pp, num_microbatches=m).compute_only()
    assert texts(schedule) == single_order(torch_name, pp=pp, num_microbatches=m)


@pytest.mark.parametrize(
    ("pp", "m"), [(1, 3), (2, 1), (2, 4), (2, 8), (3, 2), (3, 5), (4, 4), (4, 7), (4, 10), (4, 12)]
)
@pytest.mark.parametrize("chunks", [2, 3])
def test_interleaved_computes_in_the_order_of_torch(pp, m, chunks):
    sizes = {"pp": pp, "num_microbatches": m, "num_chunks": chunks}
    schedule = build("interleaved_1f1b", **sizes).compute_only()
    assert texts(schedule) == looped_order("ScheduleInterleaved1F1B", **sizes)


def test_gpipe_with_chunks_runs_forward_in_the_order_of_torch():
    sizes = {"pp": 2, "num_microbatches": 5, "num_chunks": 3}
    forwards = forward_only(build("gpipe", **sizes)).compute_only()
    expected = [
        " ".join(text for text in row.split() if "F" in text)
        for row in looped_order("ScheduleLoopedBFS", **sizes)
    ]
    assert texts(forwards) == expected


@pytest.mark.parametrize("m", [1, 2, 4, 9])
def test_1f1b_keeps_few_activations_alive(m):
    schedule = build("1f1b", pp=4, num_microbatches=m)
    assert peak_in_flight(schedule) == tuple(min(m, 4 - rank) for rank in range(4))


def test_gpipe_keeps_all_activations_alive():
    schedule = build("gpipe", pp=3, num_microbatches=5, num_chunks=2)
    assert peak_in_flight(schedule) == (10, 10, 10)


def test_interleaved_keeps_as_many_activations_alive_as_the_formula():
    schedule = build("interleaved_1f1b", pp=4, num_microbatches=8, num_chunks=2)
    # p (1 + (p - 1) / (p v)) micro-batches of v chunks each (Korthikanti et al., 2022, 4.2.3).
    assert peak_in_flight(schedule)[0] == 4 * 2 + 4 - 1


def test_inference_keeps_every_forward_in_flight():
    assert peak_in_flight(forward_only(build("1f1b", pp=2, num_microbatches=3))) == (3, 3)


def test_the_same_arguments_give_the_same_schedule():
    sizes = {"pp": 4, "num_microbatches": 8, "num_chunks": 2}
    assert build("interleaved_1f1b", **sizes) == build("interleaved_1f1b", **sizes)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ScheduleError, match="'zb'; known: 1f1b, dualpipe_v, gpipe, "):
        build("zb", pp=2, num_microbatches=2)


@pytest.mark.parametrize("option", ["pp", "num_microbatches", "num_chunks"])
def test_sizes_below_one_are_refused(option):
    sizes = {"pp": 2, "num_microbatches": 2, "num_chunks": 1, option: 0}
    with pytest.raises(ScheduleError, match=f"'gpipe': {option} must be at least 1, got 0"):
        build("gpipe", **sizes)


def test_1f1b_refuses_chunks():
    with pytest.raises(ScheduleError, match=r"num_chunks=2; use schedule='interleaved_1f1b'"):
        build("1f1b", pp=2, num_microbatches=4, num_chunks=2)


def test_interleaved_refuses_one_chunk():
    with pytest.raises(ScheduleError, match=r"num_chunks=1; use schedule='1f1b'"):
        build("interleaved_1f1b", pp=2, num_microbatches=4)


@pytest.mark.parametrize(
    ("pp", "m", "advice"),
    [
        (4, 9, "use 8, 10 or any multiple of 4"),
        (2, 5, "use 4, 6 or any multiple of 2"),
        (4, 13, "use 12, 15 or any multiple of 4"),
    ],
)
def test_interleaved_names_the_micro_batch_counts_that_work(pp, m, advice):
    with pytest.raises(ScheduleError, match=f"num_microbatches={m} .* equal rounds.*{advice}"):
        build("interleaved_1f1b", pp=pp, num_microbatches=m, num_chunks=2)
    for count in map(int, advice.replace(",", " ").split()[1:3]):
        check(build("interleaved_1f1b", pp=pp, num_microbatches=count, num_chunks=2))


def test_a_registered_builder_can_place_stages_as_it_likes():
    schedule = build("test_v_shape", pp=2, num_microbatches=2)
    check(schedule)
    assert schedule.stage_to_rank == (0, 1, 1, 0)
    # The two stages in the bottom of the V are on one rank and need no messages.
    assert "1SEND_F0" not in texts(schedule)[1]


def test_a_name_is_registered_once():
    with pytest.raises(ScheduleError, match="'1f1b' is already registered"):
        register_schedule("1f1b")


def test_a_builder_with_an_impossible_order_is_refused():
    with pytest.raises(ScheduleError, match="rank 0 at 0B0 would wait forever"):
        build("test_backward_first", pp=1, num_microbatches=1)


def test_a_fault_of_a_builder_is_not_repaired_silently():
    schedule = build("test_wrong_rank", pp=2, num_microbatches=2)
    with pytest.raises(ScheduleError, match="0B1 is on rank 1 but stage 0 lives on rank 0"):
        check(schedule)

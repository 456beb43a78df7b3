from dataclasses import replace

import pytest

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule import build, check
from tests.schedule.rows import RANK0, RANK1, schedule_of


def moved(row: str, action: str, before: str) -> str:
    """The row with `action` put right before another action."""
    actions = row.split()
    actions.remove(action)
    actions.insert(actions.index(before), action)
    return " ".join(actions)


def swapped(row: str, first: str, second: str) -> str:
    other = {first: second, second: first}
    return " ".join(other.get(action, action) for action in row.split())


def without(row: str, *actions: str) -> str:
    return " ".join(action for action in row.split() if action not in actions)


def test_valid_schedule_passes():
    check(schedule_of(RANK0, RANK1))


def test_the_last_stage_may_run_micro_batches_in_any_order():
    check(schedule_of("0F1 0F0 0B0 0B1"))


def test_a_split_backward_passes():
    check(schedule_of("0F0 0B0 0F1 0B1 0W1 0W0"))


FAULTS = {
    "dropped send": (
        (without(RANK0, "0SEND_F1"), RANK1),
        "rank 0 never runs 0SEND_F1; add it, the other end of 1RECV_F1",
    ),
    "dropped receive": (
        (RANK0, without(RANK1, "1RECV_F0")),
        "rank 1 never runs 1RECV_F0; add it, the other end of 0SEND_F0",
    ),
    "dropped message": (
        (without(RANK0, "0SEND_F1"), without(RANK1, "1RECV_F1")),
        "rank 0 never runs 0SEND_F1; add it$",
    ),
    "doubled receive": (
        (RANK0, RANK1.replace("1RECV_F1", "1RECV_F1 1RECV_F1")),
        "rank 1 runs 1RECV_F1 twice; keep one",
    ),
    "doubled forward": ((f"0F0 {RANK0}", RANK1), "rank 0 runs 0F0 twice"),
    "missing micro-batch": (
        (
            without(RANK0, "0F1", "0B1", "0SEND_F1", "0RECV_B1"),
            without(RANK1, "1F1", "1B1", "1RECV_F1", "1SEND_B1"),
        ),
        "rank 0 never runs 0F1; add it",
    ),
    "missing backward": (
        (without(RANK0, "0B1"), RANK1),
        "rank 0 never runs 0B1; add it",
    ),
    "extra micro-batch": ((f"{RANK0} 0F2", RANK1), "0F2 on rank 0 has no use here; remove it"),
    "message over the end": (
        (RANK0, f"{RANK1} 1SEND_F1"),
        "1SEND_F1 on rank 1 has no use here",
    ),
    "wrong rank": (
        (without(RANK0, "0B1"), f"{RANK1} 0B1"),
        "0B1 is on rank 1 but stage 0 lives on rank 0; move it there",
    ),
    "weight part twice": (("0F0 0B0 0W0 0F1 0B1 0W1 0W0",), "rank 0 runs 0W0 twice; keep one"),
    "missing weight part": (("0F0 0B0 0W0 0F1 0B1",), "rank 0 never runs 0W1; add it"),
    "weight part without backward": (("0F0 0W0 0F1 0W1",), "rank 0 never runs 0B0"),
    "backward before forward": (
        (RANK0, swapped(RANK1, "1F1", "1B1")),
        "rank 1 runs 1B1 before 1F1, which it needs; move 1F1 ahead",
    ),
    "weight part before backward": (
        ("0F0 0W0 0B0 0F1 0B1 0W1",),
        "rank 0 runs 0W0 before 0B0",
    ),
    "send before its compute": (
        (moved(RANK0, "0SEND_F1", "0F1"), RANK1),
        "rank 0 runs 0SEND_F1 before 0F1",
    ),
    "gradient sent before its backward": (
        (RANK0, moved(RANK1, "1SEND_B1", "1B1")),
        "rank 1 runs 1SEND_B1 before 1B1",
    ),
    "forward before its receive": (
        (RANK0, swapped(RANK1, "1RECV_F0", "1F0")),
        "rank 1 runs 1F0 before 1RECV_F0",
    ),
    "backward before its receive": (
        (swapped(RANK0, "0RECV_B0", "0B0"), RANK1),
        "rank 0 runs 0B0 before 0RECV_B0",
    ),
    "chunks of one rank in the wrong order": (
        ("1F0 0F0 1B0 0B0 0F1 1F1 1B1 0B1",),
        "rank 0 runs 1F0 before 0F0",
    ),
    "swapped sends": (
        ("0F0 0F1 0SEND_F1 0SEND_F0 0RECV_B0 0B0 0RECV_B1 0B1", RANK1),
        "rank 0 sends 0SEND_F1 to rank 1, which expects 0SEND_F0",
    ),
    "swapped receives": (
        (moved(RANK0, "0RECV_B1", "0RECV_B0"), RANK1),
        "rank 1 sends 1SEND_B0 to rank 0, which expects 1SEND_B1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused(fault):
    rows, message = FAULTS[fault]
    with pytest.raises(ScheduleError, match="schedule 'test': " + message):
        check(schedule_of(*rows))


def test_message_marks_the_place():
    with pytest.raises(ScheduleError) as error:
        check(schedule_of(*FAULTS["backward before forward"][0]))
    assert str(error.value).splitlines()[1:] == [
        "  rank 1: ... 1F0 1RECV_F1 1B0 1SEND_B0 >>1B1<< 1F1 1SEND_B1"
    ]


def test_swapped_order_is_found_between_different_stages_of_the_same_two_ranks():
    """Without tags a gradient and an activation between the same ranks can be mixed up, too."""
    schedule = build("interleaved_1f1b", pp=2, num_microbatches=2, num_chunks=2)
    rows = [" ".join(map(str, row)) for row in schedule.actions]
    rows[0] = moved(rows[0], "2RECV_B0", "2RECV_F1")
    with pytest.raises(ScheduleError, match="rank 1 sends 1SEND_F1 to rank 0, which expects 3SEND"):
        check(schedule_of(*rows))


def test_cyclic_wait_is_refused_with_the_cycle():
    """Both ranks send first and receive later: neither send can ever finish."""
    rank1 = moved(RANK1, "1RECV_F1", "1F1")
    with pytest.raises(ScheduleError) as error:
        check(schedule_of(RANK0, rank1))
    assert str(error.value).splitlines() == [
        "schedule 'test': cyclic wait; post the receives earlier:",
        "  rank 0 stops at 0SEND_F1 until rank 1 runs 1RECV_F1",
        "  rank 1 stops at 1SEND_B0 until rank 0 runs 0RECV_B0",
        "  rank 0: 0F0 0SEND_F0 0F1 >>0SEND_F1<< 0RECV_B0 0B0 0RECV_B1 0B1",
        "  rank 1: 1RECV_F0 1F0 1B0 >>1SEND_B0<< 1RECV_F1 1F1 1B1 1SEND_B1",
    ]


def test_a_cycle_through_a_waiting_compute_is_found():
    """Rank 0 wants a gradient before it sends the activation that leads to it."""
    rank0 = "0F0 0SEND_F0 0F1 0RECV_B0 0RECV_B1 0B0 0SEND_F1 0B1"
    rank1 = "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1"
    with pytest.raises(ScheduleError, match="rank 0 stops at 0B0 until rank 1 runs 1SEND_B0") as e:
        check(schedule_of(rank0, rank1))
    assert "rank 1 stops at 1F1 until rank 0 runs 0SEND_F1" in str(e.value)


def test_receives_posted_only_just_before_their_compute_hang_interleaved_schedules():
    built = build("interleaved_1f1b", pp=2, num_microbatches=4, num_chunks=2)
    rows = []
    for row in built.compute_only().actions:
        late = []
        sends = ()
        for action in row:
            late += [*built.receives(action), *sends, action]
            sends = built.sends(action)
        rows.append((*late, *sends))
    with pytest.raises(ScheduleError, match="cyclic wait"):
        check(replace(built, actions=tuple(rows)))

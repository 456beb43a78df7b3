import io

import pytest

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule import Action, Schedule, build, check, peak_in_flight
from tests.schedule.rows import schedule_of, texts
from tests.schedule.torch_schedules import read_csv, validate

EVERY_NAME = pytest.mark.parametrize(
    ("name", "chunks"), [("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved_1f1b", 2)]
)


def test_grid_of_1f1b():
    expected = """\
time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  15  16  17  18  19  20
rank 0 0F0 0F1 0F2 0F3 .   .   .   .   .   .   0B0 --- .   0B1 --- .   0B2 --- .   0B3 ---
rank 1 .   1F0 1F1 1F2 .   .   .   .   1B0 --- 1F3 1B1 --- .   1B2 --- .   1B3 --- .   .
rank 2 .   .   2F0 2F1 .   .   2B0 --- 2F2 2B1 --- 2F3 2B2 --- .   2B3 --- .   .   .   .
rank 3 .   .   .   3F0 3B0 --- 3F1 3B1 --- 3F2 3B2 --- 3F3 3B3 --- .   .   .   .   .   ."""
    assert build("1f1b", pp=4, num_microbatches=4).grid() == expected


def test_grid_of_interleaved_1f1b():
    expected = """\
time   0   1   2   3   4   5   6   7   8   9   10  11  12  13  14
rank 0 0F0 0F1 2F0 2F1 .   .   2B0 --- .   2B1 --- 0B0 --- 0B1 ---
rank 1 .   1F0 1F1 3F0 3B0 --- 3F1 3B1 --- 1B0 --- 1B1 --- .   ."""
    built = build("interleaved_1f1b", pp=2, num_microbatches=2, num_chunks=2)
    assert built.grid() == expected


def test_grid_gives_a_split_backward_one_step_per_part():
    schedule = schedule_of("0F0 0B0 0W0", num_microbatches=1)
    assert schedule.grid() == "time   0   1   2\nrank 0 0F0 0B0 0W0"


def test_grid_of_an_impossible_order_is_refused():
    with pytest.raises(ScheduleError, match="rank 0 at 0B0 would wait forever"):
        schedule_of("0B0 0F0").grid()


@EVERY_NAME
def test_csv_round_trip_through_a_file(tmp_path, name, chunks):
    schedule = build(name, pp=2, num_microbatches=4, num_chunks=chunks)
    schedule.to_csv(tmp_path / "schedule.csv")
    assert Schedule.from_csv(tmp_path / "schedule.csv", name=name) == schedule


def test_csv_round_trip_through_an_open_file():
    schedule = build("1f1b", pp=2, num_microbatches=2)
    file = io.StringIO()
    schedule.to_csv(file)
    file.seek(0)
    assert Schedule.from_csv(file, name="1f1b") == schedule


@EVERY_NAME
def test_torch_reads_the_same_actions_from_the_csv(tmp_path, name, chunks):
    schedule = build(name, pp=2, num_microbatches=4, num_chunks=chunks)
    schedule.to_csv(tmp_path / "schedule.csv")
    assert [" ".join(row) for row in read_csv(tmp_path / "schedule.csv")] == texts(schedule)


@EVERY_NAME
def test_torch_accepts_the_computes(tmp_path, name, chunks):
    schedule = build(name, pp=2, num_microbatches=4, num_chunks=chunks)
    schedule.compute_only().to_csv(tmp_path / "schedule.csv")
    placed = validate(
        tmp_path / "schedule.csv", pp=2, num_stages=schedule.num_stages, num_microbatches=4
    )
    assert placed == dict(enumerate(schedule.stage_to_rank))


def test_csv_may_have_idle_cells_and_blanks():
    schedule = Schedule.from_csv(io.StringIO("0F0, 0SEND_F0,,\n,1RECV_F0,1F0\n"))
    assert texts(schedule) == ["0F0 0SEND_F0", "1RECV_F0 1F0"]
    assert schedule.name == "csv"
    check(schedule)


def test_csv_with_an_unknown_action_is_refused():
    with pytest.raises(ScheduleError, match="'0REDUCE_GRAD' is not a schedule action"):
        Schedule.from_csv(io.StringIO("0F0,0B0,0REDUCE_GRAD\n"))


@pytest.mark.parametrize("text", ["", "0B0\n", "1F0,1B0\n"], ids=["empty", "no F", "stage 1 only"])
def test_csv_without_a_forward_of_each_stage_is_refused(text):
    with pytest.raises(ScheduleError, match="'mine': no rank runs a forward of stage 0"):
        Schedule.from_csv(io.StringIO(text), name="mine")


def test_a_stage_on_a_rank_that_does_not_exist_is_refused():
    with pytest.raises(ScheduleError, match="stage 1 is placed on rank 2, expected 0 to 1"):
        Schedule(name="x", num_microbatches=1, stage_to_rank=(0, 2), actions=((), ()))


def test_compute_only_drops_messages():
    schedule = build("1f1b", pp=2, num_microbatches=2).compute_only()
    assert texts(schedule) == ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]


def test_peer_is_the_rank_at_the_other_end():
    schedule = build("interleaved_1f1b", pp=3, num_microbatches=3, num_chunks=2)
    peers = [schedule.peer(Action.parse(text)) for text in ("2SEND_F0", "3RECV_F0", "4SEND_B1")]
    assert peers == [0, 2, 0]


def test_split_weight_part_keeps_activations_alive():
    rows = "0F0 0B0 0F1 0B1 0W0 0W1"
    assert peak_in_flight(schedule_of(rows)) == (2,)

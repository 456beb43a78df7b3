"""The contest of two executors: same work, both measured, and what is made of the times."""

from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.contest import Contest, SmallestModel, Time, Workload, measure
from benchmarks.executor import Figure, Idle, Race, figures_against_loop, idle, show
from ilm_compile.errors import IlmCompileError
from ilm_compile.schedule import StageTimes, build, simulate
from tests.support.world import World

V_SHAPED = pytest.mark.skipif(
    torch.__version__ < (2, 13),
    reason="torch 2.11's executor sends shapes from a rank to itself, which gloo cannot",
)
WORKLOAD = Workload(make_model=SmallestModel, rows=1, seq_len=4, num_microbatches=4)


def run_contest(rank: int, schedule: str) -> dict[str, Any]:
    contest = Contest(WORKLOAD, schedule)
    contest.check_equal()
    times = measure(contest, ["ours", "ours_whole", "theirs", "loop"], 2, warmup=0)
    contest.zero_grad()
    contest.loop()
    return {
        "walls": {name: [time.wall for time in values] for name, values in times.items()},
        "loop_gradients": len(contest.gradients()),
        "parameters": sum(1 for s in contest.stages for _ in s.module.parameters()),
        "stages": [stage.index for stage in contest.stages],
    }


@pytest.mark.parametrize(
    ("schedule", "stages"),
    [
        ("1f1b", [[0], [1]]),
        ("interleaved_1f1b", [[0, 2], [1, 3]]),
        ("zb_h1", [[0], [1]]),
        pytest.param("zb_v", [[0, 3], [1, 2]], marks=V_SHAPED),
        pytest.param("dualpipe_v", [[0, 3], [1, 2]], marks=V_SHAPED),
    ],
)
def test_both_executors_do_the_same_work(
    world2: World, schedule: str, stages: list[list[int]]
) -> None:
    found = world2.run(run_contest, schedule)
    assert [rank["stages"] for rank in found] == stages
    for rank in found:
        assert all(len(walls) == 2 and min(walls) > 0 for walls in rank["walls"].values())
        assert rank["loop_gradients"] == rank["parameters"]


def test_idle_is_what_the_timeline_leaves_and_simulates_to_the_same() -> None:
    """Two steps of 1F1B whose computes take 1 and 2 seconds, messages nothing."""
    schedule = build("1f1b", pp=2, num_microbatches=4)
    found = simulate(schedule, [StageTimes(forward=1.0, backward=2.0)] * 2)
    step = [
        {action: found.spans[action] for action in row} for row in schedule.compute_only().actions
    ]
    assert idle("1f1b", [[step[0]] * 2, [step[1]] * 2], 4) == (
        Idle("1f1b", 15, pytest.approx(0.2), 15, pytest.approx(0.2))
    )


def test_a_race_is_of_the_slowest_rank_and_of_rounds() -> None:
    """Six rounds; rank 1 is the slower one in theirs, rank 0 in ours, the machine in the last."""
    slow = [1.0, 1.0, 1.0, 1.0, 1.0, 10.0]
    ours = [1.01, 1.02, 1.03, 1.04, 1.05, 10.6]
    ranks = [
        {"theirs": [Time(t / 2, 0) for t in slow], "ours_whole": [Time(t, 0) for t in ours]},
        {"theirs": [Time(t, 0) for t in slow], "ours_whole": [Time(t / 2, 0) for t in ours]},
    ]
    race = Race.of("1f1b", ranks)
    assert (race.theirs, race.ours) == (1.0, pytest.approx(1.035))
    assert (race.ratio, race.lower, race.upper) == pytest.approx((1.035, 1.01, 1.06))


class Unequal(Contest):
    """A contest whose second contestant computes something else."""

    def __init__(self) -> None:
        self.value = 0.0

    def ours(self) -> None:
        self.value = 1.0

    def theirs(self) -> None:
        self.value = 1.1

    def zero_grad(self) -> None: ...

    def gradients(self) -> list[Tensor]:
        return [torch.tensor(self.value)]


def test_unequal_work_is_no_contest() -> None:
    with pytest.raises(IlmCompileError, match="expected the same gradients from both executors"):
        Unequal().check_equal()


def test_own_cost_is_what_a_step_takes_more_than_the_loop_of_its_round() -> None:
    times = {
        "loop": [Time(wall=1, cpu=1), Time(wall=1, cpu=5), Time(wall=1, cpu=1)],
        "ours": [Time(wall=9, cpu=3), Time(wall=9, cpu=7), Time(wall=9, cpu=3)],
    }
    (figure,) = figures_against_loop(times, "1f1b", 0, num_microbatches=2)
    assert (figure.contestant, figure.median, figure.lower, figure.upper) == ("ours", 1, 1, 1)


def test_the_table_shows_ratios_to_torch() -> None:
    figures = [
        Figure("1f1b", 0, "theirs", "cpu", median=0.004, lower=0.003, upper=0.005),
        Figure("1f1b", 0, "ours", "cpu", median=0.003, lower=0.003, upper=0.003),
    ]
    console = Console(record=True, width=120)
    show(figures, "title", console)
    text = console.export_text()
    row = next(line for line in text.splitlines() if "ours" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == (
        ["1f1b", "ours", "cpu", "0", "3.000", "0.75", "3.000", "1.00"]
    )

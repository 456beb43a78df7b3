"""What our executor costs beside torch.distributed.pipelining's: `python -m benchmarks.executor`.

Two processes on the CPU (or `--ranks`), one or two pipeline stages each, over gloo. In one run and
in turn, both executors run the same stage modules on the same micro-batches: see
`benchmarks.contest`, which also checks that both leave the same gradients.

Own cost (a model that computes next to nothing): processor time of a step, less that of a plain
loop over the same stage computations on fixed tensors, without any message; per rank and
micro-batch. Each step is compared with the loop of its own round, and the median over the rounds
is told. Processor time is that of all threads of the process, so the threads that move messages
count, and waiting for the other rank does not. "ours, whole" is `execute_schedule`, which also
checks the batch, brings the loss to every rank and gives the gradients to the DTensors; torch's
`step` does none of these.

Step time (8 transformer blocks of hidden size 512, 16 sequences of 128 tokens): wall time of
`execute_schedule` and of torch's `step`, per rank, medians; and the processor time of the same
steps, which other work on the machine disturbs less. Race: the wall time of the slowest rank, ours
by torch's of the same round, median with its 95% interval. Where the processes' memory lies moves a
step by some percent, so the rounds are those of several launches.

Idle: the part of a step of ours in which the ranks compute nothing, by the recorded timeline, and
the same step simulated with the median times of its stages. Where there are more ranks than cores,
computes wait for each other's cores, and neither this nor the step time says much.

Other work on the machine only ever adds: where it is busy, the lower quartile says more than the
median.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median, quantiles
from typing import TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from scipy.stats import quantile_test

from benchmarks.common import RESULTS, launch, make_console, make_parser, save_json
from benchmarks.contest import (
    SCHEDULES,
    Contest,
    SmallestModel,
    Time,
    Workload,
    measure,
    transformer,
)
from ilm_compile.schedule import Action, Kind, StageTimes, build, simulate
from ilm_compile.schedule.simulate import Span

T = TypeVar("T")
FEWEST_ROUNDS = 6  # of which a median has a 95% interval
CONTESTANTS = {"theirs": "torch", "ours": "ours", "ours_whole": "ours, whole"}


@dataclass(frozen=True, slots=True)
class Figure:
    """What one contestant took on one rank, in seconds: median and quartiles.

    clock: "cpu", the processor time of all threads of the process, or "wall".
    """

    schedule: str
    rank: int
    contestant: str
    clock: str
    median: float
    lower: float
    upper: float

    @classmethod
    def of(
        cls, schedule: str, rank: int, contestant: str, clock: str, samples: Sequence[float]
    ) -> Figure:
        lower, _, upper = quantiles(samples, n=4)
        return cls(schedule, rank, contestant, clock, median(samples), lower, upper)


Steps = dict[str, list[Time]]  # of one rank, by contestant and round
Timeline = dict[Action, Span]  # the computes of one rank in one step


def own_cost_on_rank(contest: Contest, schedule: str, repeats: int) -> list[Figure]:
    """The processor seconds per micro-batch that each contestant adds to the plain loop."""
    times = measure(contest, [*CONTESTANTS, "loop"], repeats)
    rank = contest.parallel.mesh.rank
    return figures_against_loop(times, schedule, rank, contest.num_microbatches)


def figures_against_loop(
    times: Mapping[str, Sequence[Time]], schedule: str, rank: int, num_microbatches: int
) -> list[Figure]:
    """What each contestant's steps took more than the loop of the same round, per micro-batch."""
    figures = []
    for name, steps in times.items():
        if name != "loop":
            pairs = zip(steps, times["loop"], strict=True)
            costs = [(step.cpu - loop.cpu) / num_microbatches for step, loop in pairs]
            figures.append(Figure.of(schedule, rank, name, "cpu", costs))
    return figures


def step_time_on_rank(
    contest: Contest, schedule: str, repeats: int
) -> tuple[Steps, list[Timeline]]:
    """The times of whole steps, ours through `execute_schedule`, and timelines of as many steps of
    our executor."""
    times = measure(contest, ["theirs", "ours_whole"], repeats)
    timelines = []
    for _ in range(repeats):
        contest.zero_grad()
        dist.barrier()
        timelines.append(contest.timeline())
    return times, timelines


def step_figures(schedule: str, ranks: Sequence[Steps]) -> list[Figure]:
    """What the steps of each rank took by either clock."""
    return [
        Figure.of(schedule, rank, name, clock, [getattr(time, clock) for time in steps])
        for rank, times in enumerate(ranks)
        for clock in ("wall", "cpu")
        for name, steps in times.items()
    ]


@dataclass(frozen=True, slots=True)
class Race:
    """Seconds of a step of the slowest rank, medians, and ours by theirs of the same round.

    lower, upper: the 95% confidence interval of the ratio's median, from its order statistics;
    there is none for less than six rounds.
    """

    schedule: str
    theirs: float
    ours: float
    ratio: float
    lower: float
    upper: float

    @classmethod
    def of(cls, schedule: str, ranks: Sequence[Steps]) -> Race:
        theirs, ours = (
            [
                max(time.wall for time in each)
                for each in zip(*(r[name] for r in ranks), strict=True)
            ]
            for name in ("theirs", "ours_whole")
        )
        ratios = [ours / theirs for ours, theirs in zip(ours, theirs, strict=True)]
        interval = quantile_test(ratios, p=0.5).confidence_interval(0.95)
        return cls(schedule, median(theirs), median(ours), median(ratios), *map(float, interval))


def on_rank(
    function: Callable[[Contest, str, int], T],
    workload: Workload,
    schedules: Sequence[str],
    repeats: int,
) -> list[T]:
    """What `function` finds for each schedule, after a look that both executors do the same."""
    found = []
    for schedule in schedules:
        contest = Contest(workload, schedule)
        contest.check_equal()
        found.append(function(contest, schedule, repeats))
    return found


@dataclass(frozen=True, slots=True)
class Idle:
    """Seconds of a step from the first to the last compute of the longest rank, and the part of it
    in which the ranks compute nothing: medians of what was measured, and simulated."""

    schedule: str
    step: float
    idle: float
    simulated_step: float
    simulated_idle: float


def idle(name: str, ranks: Sequence[Sequence[Timeline]], num_microbatches: int) -> Idle:
    """What the steps of all ranks come to, which are lists of equal length."""
    steps, idles = [], []
    for spans in zip(*ranks, strict=True):
        longest = max(
            max(s.stop for s in r.values()) - min(s.start for s in r.values()) for r in spans
        )
        busy = mean(sum(span.stop - span.start for span in r.values()) for r in spans)
        steps.append(longest)
        idles.append(1 - busy / longest)
    took: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    for action, span in (each for rank in ranks for step in rank for each in step.items()):
        took[action.stage, action.kind].append(span.stop - span.start)
    chunks = SCHEDULES[name][1]
    schedule = build(name, pp=len(ranks), num_microbatches=num_microbatches, num_chunks=chunks)
    middle = {key: median(seconds) for key, seconds in took.items()}
    times = [
        StageTimes(
            forward=middle[stage, Kind.F],
            backward=middle[stage, Kind.B],
            weight=middle.get((stage, Kind.W), 0.0),
        )
        for stage in range(schedule.num_stages)
    ]
    found = simulate(schedule, times)
    return Idle(name, median(steps), median(idles), found.cost, mean(found.bubbles))


def show(figures: Sequence[Figure], title: str, console: Console) -> None:
    """Print the figures in milliseconds, with each one's ratio to torch's."""
    table = Table(title=title)
    for column in ("schedule", "executor", "clock"):
        table.add_column(column)
    for column in ("rank", "median ms", "ratio to torch", "lower quartile ms", "ratio to torch"):
        table.add_column(column, justify="right")
    theirs = {(f.schedule, f.rank, f.clock): f for f in figures if f.contestant == "theirs"}
    for figure in figures:
        other = theirs[figure.schedule, figure.rank, figure.clock]
        table.add_row(
            figure.schedule,
            CONTESTANTS[figure.contestant],
            figure.clock,
            str(figure.rank),
            f"{figure.median * 1e3:.3f}",
            f"{figure.median / other.median:.2f}",
            f"{figure.lower * 1e3:.3f}",
            f"{figure.lower / other.lower:.2f}",
            end_section=figure.contestant == "ours_whole",
        )
    console.print(table)


def show_races(found: Sequence[Race], console: Console) -> None:
    """Print the steps of the slowest rank and whether they differ."""
    table = Table(title="Step of the slowest rank, ours beside torch's")
    for column in ("schedule", "torch ms", "ours ms", "ratio", "95% interval"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for race in found:
        times = (f"{1e3 * seconds:.0f}" for seconds in (race.theirs, race.ours))
        interval = f"{race.lower:.3f} to {race.upper:.3f}"
        table.add_row(race.schedule, *times, f"{race.ratio:.3f}", interval)
    console.print(table)


def show_idle(found: Sequence[Idle], console: Console) -> None:
    """Print what was measured beside what is simulated."""
    table = Table(title="Idle part of a step, ours, all ranks")
    for column in ("schedule", "step ms", "simulated", "idle", "simulated"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for each in found:
        times = (f"{1e3 * seconds:.1f}" for seconds in (each.step, each.simulated_step))
        parts = (f"{part:.1%}" for part in (each.idle, each.simulated_idle))
        table.add_row(each.schedule, *times, *parts)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("executor", __doc__)
    parser.add_argument("--repeats", type=int, default=80, help="measured steps, own cost")
    parser.add_argument("--step-repeats", type=int, default=10, help="measured steps, step time")
    parser.add_argument("--launches", type=int, default=3, help="of as many steps, step time")
    parser.add_argument(
        "--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES, metavar="NAME"
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes, one pipeline rank each")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.launches * options.step_repeats < FEWEST_ROUNDS:
        parser.error(f"--launches times --step-repeats: expected {FEWEST_ROUNDS} rounds or more")
    date = datetime.now(UTC).date().isoformat()
    output = options.output or RESULTS / f"executor-{date}.json"
    console = make_console()

    smallest = Workload(make_model=SmallestModel, rows=1, seq_len=16)
    found = launch(
        on_rank, options.ranks, own_cost_on_rank, smallest, options.schedules, options.repeats
    )
    own = [figure for by_rank in zip(*found, strict=True) for each in by_rank for figure in each]
    show(own, "Own cost per rank and micro-batch", console)
    real = Workload(make_model=transformer, rows=2, seq_len=128)
    launches = [
        launch(
            on_rank, options.ranks, step_time_on_rank, real, options.schedules, options.step_repeats
        )
        for _ in range(options.launches)
    ]
    joined = [
        [_join(each) for each in zip(*runs, strict=True)] for runs in zip(*launches, strict=True)
    ]
    steps, races, idles = [], [], []
    for schedule, by_rank in zip(options.schedules, zip(*joined, strict=True), strict=True):
        times = [each for each, _ in by_rank]
        steps += step_figures(schedule, times)
        races.append(Race.of(schedule, times))
        timelines = [timelines for _, timelines in by_rank]
        idles.append(idle(schedule, timelines, real.num_microbatches))
    show(steps, "Step time: hidden 512, 8 blocks, 16 x 128 tokens, 8 micro-batches", console)
    show_races(races, console)
    show_idle(idles, console)
    save_json(output, {"own_cost_s": own, "step_time_s": steps, "race": races, "idle": idles})
    console.print(f"written to {output}")


def _join(runs: Sequence[tuple[Steps, list[Timeline]]]) -> tuple[Steps, list[Timeline]]:
    """The rounds of several launches as those of one."""
    names = runs[0][0]
    times = {name: [time for steps, _ in runs for time in steps[name]] for name in names}
    return times, [timeline for _, timelines in runs for timeline in timelines]


if __name__ == "__main__":
    # What ranks return is pickled under the name of its module, which must not be "__main__".
    from benchmarks.executor import main as run

    run()

"""What our executor costs beside torch.distributed.pipelining's: `python -m benchmarks.executor`.

Two processes on the CPU, one pipeline stage each (two with the interleaved schedule), over gloo. In
one run and in turn, both executors run the same stage modules on the same micro-batches: see
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
steps, which other work on the machine disturbs less.

Other work on the machine only ever adds: where it is busy, the lower quartile says more than the
median.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

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

NUM_RANKS = 2
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


def own_cost_on_rank(workload: Workload, schedule: str, repeats: int) -> list[Figure]:
    """The processor seconds per micro-batch that each contestant adds to the plain loop."""
    contest = Contest(workload, schedule)
    contest.check_equal()
    times = measure(contest, [*CONTESTANTS, "loop"], repeats)
    rank = contest.parallel.mesh.rank
    return figures_against_loop(times, schedule, rank, workload.num_microbatches)


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


def step_time_on_rank(workload: Workload, schedule: str, repeats: int) -> list[Figure]:
    """The seconds of a whole step by either clock, ours through `execute_schedule`."""
    contest = Contest(workload, schedule)
    contest.check_equal()
    rank = contest.parallel.mesh.rank
    times = measure(contest, ["theirs", "ours_whole"], repeats)
    return [
        Figure.of(schedule, rank, name, clock, [getattr(time, clock) for time in steps])
        for clock in ("wall", "cpu")
        for name, steps in times.items()
    ]


def collect(function: Any, workload: Workload, repeats: int) -> list[Figure]:
    """The figures of all schedules and ranks."""
    return [
        figure
        for schedule in SCHEDULES
        for figures in launch(function, NUM_RANKS, workload, schedule, repeats)
        for figure in figures
    ]


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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("executor", __doc__)
    parser.add_argument("--repeats", type=int, default=80, help="measured steps, own cost")
    parser.add_argument("--step-repeats", type=int, default=10, help="measured steps, step time")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    date = datetime.now(UTC).date().isoformat()
    output = options.output or RESULTS / f"executor-{date}.json"
    console = make_console()

    smallest = Workload(make_model=SmallestModel, rows=1, seq_len=16)
    own = collect(own_cost_on_rank, smallest, options.repeats)
    show(own, "Own cost per rank and micro-batch", console)
    real = Workload(make_model=transformer, rows=2, seq_len=128)
    steps = collect(step_time_on_rank, real, options.step_repeats)
    show(steps, "Step time: hidden 512, 8 blocks, 16 x 128 tokens, 8 micro-batches", console)
    save_json(output, {"own_cost_s": own, "step_time_s": steps})
    console.print(f"written to {output}")


if __name__ == "__main__":
    # What ranks return is pickled under the name of its module, which must not be "__main__".
    from benchmarks.executor import main as run

    run()

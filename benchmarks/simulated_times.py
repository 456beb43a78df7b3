"""Simulated beside measured: the time of a pipeline's step, from the times of its own stages.

    python -m benchmarks.simulated_times --output benchmarks/results/simulated_times.json

Two processes over gloo run steps under every schedule, each action timed. Of each step, every stage
is given the median that its forwards, backwards and weight parts took in that very step, and the
schedule is simulated with those: what differs are messages, waiting, and actions that took longer
than others. `--picture FOLDER` writes both timelines of the last step as SVG. More ranks than cores
would measure how they are scheduled, so two is all that a machine of two cores can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import RESULTS, launch, make_parser, random_batch, save_json, show_table
from benchmarks.peak_memory import MICRO_BATCHES, PP, ROWS, SEQ, VOCAB, compiled, name_of, plans
from ilm_compile.files import write_text
from ilm_compile.partitioning import make_schedule
from ilm_compile.program.plan import Plan
from ilm_compile.runtime.observe.timeline_picture import Spans, draw_timelines, simulated
from ilm_compile.schedule import Action, Schedule

WARM_UP = 2
COLUMNS = ("schedule", "simulated", "measured", "error")  # medians over steps; seconds, relative
Step = dict[str, tuple[float, float]]  # by the text of an action


def run_rank(plans: Sequence[Plan], steps: int) -> list[list[Step]]:
    """Return when each action of this rank began and ended, in every step under each plan."""
    found, batch = [], random_batch(ROWS * MICRO_BATCHES, SEQ, VOCAB)
    for _, _, parallel in compiled(plans):
        parallel.executor.record_timeline = True
        of_plan: list[Step] = []
        for _ in range(WARM_UP + steps):
            parallel.zero_grad()
            parallel.execute_schedule(batch)
            of_plan.append({text: (a, b) for text, a, b in parallel.executor.timeline})
        found.append(of_plan[WARM_UP:])
    return found


def spans_of(schedule: Schedule, ranks: Sequence[Step]) -> dict[Action, tuple[float, float]]:
    """Return the spans of all computes. The ranks share the machine's clock."""
    return {
        action: step[str(action)]
        for row, step in zip(schedule.actions, ranks, strict=True)
        for action in row
        if action.is_compute
    }


def makespan(spans: Spans) -> float:
    """Return the time from the first start to the last end."""
    return max(end for _, end in spans.values()) - min(start for start, _ in spans.values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write the JSON."""
    parser = make_parser("simulated_times", __doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "simulated_times.json")
    parser.add_argument("--steps", type=int, default=9, help="measured of each schedule")
    parser.add_argument("--picture", type=Path, metavar="FOLDER", help="write timelines as SVG")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        tried = list(plans(Path(folder), [False]))
        schedules = [make_schedule(plan) for plan in tried]
        ranks = launch(run_rank, PP, tried, options.steps)
    for plan, schedule, *steps in zip(tried, schedules, *ranks, strict=True):
        both = []
        for each in zip(*steps, strict=True):
            spans = spans_of(schedule, each)
            both.append((makespan(simulated(schedule, spans)), makespan(spans)))
        middle = (median(times) for times in zip(*both, strict=True))
        figures = (name_of(plan), *middle, median(abs(p / m - 1) for p, m in both))
        rows.append(dict(zip(COLUMNS, figures, strict=True)))
        if options.picture:
            name = name_of(plan)
            svg = draw_timelines(schedule, spans, title=f"a step, {name}")
            write_text(options.picture / f"{name}.svg", svg)
    lines = [
        (name, f"{simulated * 1e3:.1f}", f"{measured * 1e3:.1f}", f"{error:.1%}")
        for name, simulated, measured, error in map(dict.values, rows)
    ]
    show_table("milliseconds of a step, and the error of the simulated", COLUMNS, lines)
    median_error = median(row["error"] for row in rows)
    save_json(options.output, {"pp": PP, "median_error": median_error, "rows": rows})


if __name__ == "__main__":
    main()

"""Two plans of one model side by side: what differs, what is predicted, what runs measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import NamedTuple

from ilm_compile.errors import PlanError
from ilm_compile.planner.expected import expect
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.step_traffic import predicted_traffic
from ilm_compile.runtime.observe.recorders import METRICS_FILE

WARM_UP = 3  # steps of a run that are not measured
_MEASURED = {
    "step_time_s": ("measured: seconds of a step", "{:.4f}"),
    "tokens_per_second_per_rank": ("measured: tokens/s per device", "{:,.0f}"),
    "loss": ("measured: last loss", "{:.4f}"),
}


class Line(NamedTuple):
    """A thing and what it is under each plan."""

    what: str
    values: tuple[str, ...]


def compare_programs(programs: Sequence[Program]) -> list[Line]:
    """Return the fields of the plans that differ, and what is predicted for each.

    Seconds are those of the whole step (see `expect`); idle is the pipeline's share of its own;
    bytes sent are those of the pipeline rank that sends most.
    """
    plans = [program.plan for program in programs]
    lines = [
        Line(field.name, values)
        for field in fields(Plan)
        if len(set(values := tuple(str(getattr(plan, field.name)) for plan in plans))) > 1
    ]
    found = [expect(program) for program in programs]
    sent = [
        max(sum(traffic.num_bytes for traffic in rank.values()) for rank in predicted_traffic(p))
        for p in programs
    ]
    peaks = [max(each.memory) for each in found]
    counts = [sum(region.recompute for region in program.regions) for program in programs]
    rows: list[tuple[str, list[str]]] = [
        ("ranks", [f"{each.num_ranks}" for each in found]),
        ("predicted: ms of a step", [f"{each.seconds * 1e3:.3f}" for each in found]),
        (
            "predicted: tokens/s per device",
            [f"{each.tokens / each.seconds / each.num_ranks:,.0f}" for each in found],
        ),
        ("predicted: idle", [f"{each.step.bubble:.1%}" for each in found]),
        ("predicted: MiB of the fullest rank", [f"{peak / 2**20:,.1f}" for peak in peaks]),
        ("predicted: MiB sent per step", [f"{size / 2**20:,.2f}" for size in sent]),
        ("blocks recomputed", [str(count) for count in counts]),
        ("nodes", [str(len(list(program.calls()))) for program in programs]),
    ]
    return lines + [Line(what, tuple(values)) for what, values in rows]


def compare_runs(folders: Sequence[Path]) -> list[Line]:
    """Return what runs in these folders measured: medians over their steps but the first few.

    Raises `PlanError` for a folder without metrics, or of fewer steps.
    """
    runs = [_steps(folder) for folder in folders]
    lines = []
    for key, (what, form) in _MEASURED.items():
        found = [[step[key] for step in run if step.get(key) is not None] for run in runs]
        if all(found):
            values = [each[-1] if key == "loss" else median(each) for each in found]
            lines.append(Line(what, tuple(form.format(value) for value in values)))
    return lines


def _steps(folder: Path) -> list[dict[str, float]]:
    path = folder / METRICS_FILE
    if not path.is_file():
        raise PlanError(f"diff: {folder} has no {METRICS_FILE}; give the folder of a run")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    steps = [line for line in lines if "group" not in line]
    if len(steps) <= WARM_UP:
        raise PlanError(f"diff: {path} has {len(steps)} steps; expected more than {WARM_UP}")
    return steps[WARM_UP:]

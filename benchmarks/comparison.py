"""Plans compared: what their runs have in common, as one row of figures each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.common import launch, make_model
from benchmarks.plan_run import RankRun, Row, Settings, Timeline, run_plan
from ilm_compile.cost import Hardware
from ilm_compile.partitioning import make_schedule, partition
from ilm_compile.planner import expect
from ilm_compile.program.plan import Plan
from ilm_compile.schedule.timeline import timeline

_COMPUTE = re.compile(r"\d+[FB]\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The figures of one plan; of those that differ by rank, the largest."""

    row: Row
    step_time_s: float
    tokens_per_second: float
    sent_bytes: int
    peak_bytes: int
    bubble: float
    expected_bubble: float
    loss_error: float
    ranks: list[RankRun]
    predicted_s: float | None = None

    @property
    def error(self) -> float | None:
        """How far the prediction is from the measured step, relative to that."""
        return None if self.predicted_s is None else self.predicted_s / self.step_time_s - 1


def compare(row: Row, settings: Settings, plain: RankRun) -> Comparison:
    """Train under a plan in new processes and compare with the run in plain PyTorch."""
    return summary(row, settings, plain, launch(run_plan, row.num_processes, settings, row))


def summary(row: Row, settings: Settings, plain: RankRun, ranks: list[RankRun]) -> Comparison:
    """The figures of a run. step_time_s: median of the slowest rank's."""
    step_time = median(map(max, zip(*(rank.step_times_s for rank in ranks), strict=True)))
    losses = zip(ranks[0].losses, plain.losses, strict=True)
    return Comparison(
        row=row,
        step_time_s=step_time,
        tokens_per_second=settings.rows * settings.seq_len / step_time,
        sent_bytes=max(sum(rank.sent_bytes.values()) for rank in ranks),
        peak_bytes=max(rank.peak_bytes for rank in ranks),
        bubble=measured_bubble([rank.timelines for rank in ranks]),
        expected_bubble=expected_bubble(row.plan),
        loss_error=max(abs(loss - expected) / abs(expected) for loss, expected in losses),
        ranks=ranks,
    )


def predict(row: Row, settings: Settings, hardware: Hardware) -> float:
    """The seconds of a step under a plan, before anything is run."""
    model = make_model(settings.preset, settings.overrides)
    inputs = model.example_inputs(settings.rows // row.num_slices, settings.seq_len)
    return expect(partition(model, example_inputs=inputs, plan=row.plan), hardware).seconds


def median_error(comparisons: Sequence[Comparison]) -> float:
    """The median of the predictions' errors, of those rows that have one."""
    return median(abs(one.error) for one in comparisons if one.error is not None)


def regret(comparisons: Sequence[Comparison]) -> float:
    """How much slower the plan predicted fastest was than the fastest measured."""
    found = [one for one in comparisons if one.predicted_s is not None]
    chosen = min(found, key=lambda one: one.predicted_s or 0.0)
    return chosen.step_time_s / min(one.step_time_s for one in found) - 1


def is_compute(action: str) -> bool:
    """Whether an action of a timeline is a forward or a backward."""
    return _COMPUTE.fullmatch(action) is not None


def measured_bubble(timelines: Sequence[Sequence[Timeline]]) -> float:
    """The share of the schedule's time in which a rank ran neither a forward nor a backward.

    timelines: of each rank those of the recorded steps; 0 without any. Over all ranks, from the
    first action of any to the last of any; the median over the steps. Collectives inside a forward
    or backward (tp, dp) count as compute.
    """
    steps = list(zip(*timelines, strict=True))
    return float(median(map(_bubble, steps))) if steps else 0.0


def expected_bubble(plan: Plan) -> float:
    """The same share as the schedule alone gives it, a backward taking two forwards."""
    schedule = make_schedule(plan)
    steps = timeline(schedule.compute_only().actions, schedule.num_stages).values()
    span = max(step.stop for step in steps) * schedule.num_ranks
    return 1 - sum(map(len, steps)) / span


def _bubble(ranks: Sequence[Timeline]) -> float:
    """The bubble of one step."""
    events = [event for events in ranks for event in events]
    span = max(end for _, _, end in events) - min(start for _, start, _ in events)
    busy = sum(end - start for action, start, end in events if is_compute(action))
    return float(1 - busy / (span * len(ranks)))

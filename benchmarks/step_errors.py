"""How far predictions are from published steps, by kind of row, and what a bad choice costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median

from rich.table import Table

from benchmarks.step_rows import Step

KINDS: dict[str, Callable[[Step], bool]] = {
    "A100 node sweep": lambda s: "ground_truth_single" in s.source,
    "other single nodes": lambda s: s.plan.gpus <= 8 and "ground_truth_single" not in s.source,
    "multi-node": lambda s: s.plan.gpus > 8,
    "H100 FSDP": lambda s: s.hardware.name == "h100" and s.plan.zero >= 2,
}


@dataclass(frozen=True, slots=True)
class Errors:
    """predicted: seconds of each of `steps`."""

    steps: Sequence[Step]
    predicted: Sequence[float]

    def of(self, belongs: Callable[[Step], bool]) -> list[float]:
        """Relative errors of the measured steps that belong."""
        return [
            p / s.seconds - 1
            for s, p in zip(self.steps, self.predicted, strict=True)
            if s.seconds and belongs(s)
        ]


def _is_from(source: str, step: Step) -> bool:
    return step.source == source


def error_table(title: str, errors: Errors) -> Table:
    """Median, mean and largest error by kind and by source."""
    table = Table("rows", "n", "median", "mean", "largest", "bias", title=title)
    groups = {name: errors.of(belongs) for name, belongs in KINDS.items()}
    for source in sorted({step.source for step in errors.steps}):
        groups[source] = errors.of(partial(_is_from, source))
    groups["all"] = errors.of(lambda step: True)
    for name, found in groups.items():
        if found:
            sizes = [abs(error) for error in found]
            figures = (median(sizes), mean(sizes), max(sizes), median(found))
            table.add_row(name, str(len(found)), *(f"{figure:.1%}" for figure in figures))
    return table


def regret(steps: Sequence[Step], predicted: Sequence[float]) -> float:
    """How much slower the plan predicted fastest was than the fastest measured, on average.

    Over the groups of at least two steps with the same devices, batch and model.
    """
    groups: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for step, seconds in zip(steps, predicted, strict=True):
        batch = round(step.plan.micro_batch * step.plan.num_microbatches * step.plan.dp)
        key = (step.plan.gpus, batch, step.plan.seq, step.model, step.sizes)
        if step.seconds:
            groups.setdefault(key, []).append((seconds, step.seconds))
    losses = [
        min(group)[1] / min(measured for _, measured in group) - 1
        for group in groups.values()
        if len(group) > 1
    ]
    return mean(losses) if losses else 0.0

"""How far predictions are from published steps, by kind of row, and what a bad choice costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean, median

from benchmarks.common import show_table
from benchmarks.step_rows import Step

KINDS: dict[str, Callable[[Step], bool]] = {
    "A100 node sweep": lambda s: "ground_truth_single" in s.source,
    "other single nodes": lambda s: s.plan.gpus <= 8 and "ground_truth_single" not in s.source,
    "multi-node": lambda s: s.plan.gpus > 8,
    "H100 FSDP": lambda s: s.hardware.name == "h100" and s.plan.zero >= 2,
}


def show_errors(title: str, steps: Sequence[Step], predicted: Sequence[float]) -> None:
    """Print median, mean and largest error by kind and by source, and the regret.

    predicted: seconds of each step.
    """
    groups: dict[str, list[float]] = {name: [] for name in KINDS}
    groups |= {source: [] for source in sorted({step.source for step in steps})} | {"all": []}
    for step, seconds in zip(steps, predicted, strict=True):
        if step.seconds:
            kinds = [name for name, belongs in KINDS.items() if belongs(step)]
            for name in (*kinds, step.source, "all"):
                groups[name].append(seconds / step.seconds - 1)
    lines = []
    for name, errors in groups.items():
        if errors:
            sizes = [abs(error) for error in errors]
            figures = (median(sizes), mean(sizes), max(sizes), median(errors))
            lines.append((name, len(errors), *(f"{figure:.1%}" for figure in figures)))
    show_table(title, ("rows", "n", "median", "mean", "largest", "bias"), lines)
    print(f"regret: {regret(steps, predicted):.1%}")


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

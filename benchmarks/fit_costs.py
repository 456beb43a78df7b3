"""Fit the constants of `ilm_compile.cost.constants` to published steps: `python -m
benchmarks.fit_costs ROWS.csv`.

Prints the constants, and the errors on rows that were not fitted: on each fifth of the rows in
turn, and on each source in turn. So of the memory, where a row has it. Least squares on the
logarithm, robust against the few
rows that no formula explains; bounds are what the physics allows. Deterministic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from benchmarks.common import make_parser, show_table
from benchmarks.step_errors import show_errors
from benchmarks.step_rows import Step, read_rows, read_step
from ilm_compile.cost.constants import AMPERE, HOPPER, SOFTWARE

ROBUST = 0.06  # beyond this error, in logarithms, a row counts less
PRIOR = 0.02  # how strongly a constant is held at where it starts
FOLDS = 5

MEGATRON = ("megatron", "megatron-deepspeed")
FUSED = ("ilm_compile", "llm-foundry", "torchtitan", "internevo")
ALL = (*MEGATRON, *FUSED)


@dataclass(frozen=True, slots=True)
class Constant:
    """A field of the rows `owners` (software, or generations of devices), which share its value."""

    field: str
    owners: tuple[str, ...]
    start: float
    low: float
    high: float


CONSTANTS = (
    Constant("matmul", ("ampere",), 0.80, 0.60, 0.95),
    Constant("matmul", ("hopper",), 0.65, 0.45, 0.90),
    Constant("attention", ("ampere",), 0.40, 0.15, 0.70),
    Constant("attention", ("hopper",), 0.30, 0.10, 0.60),
    Constant("operands", ("ampere", "hopper"), 1.5, 0.5, 4.0),
    Constant("scores_traffic", ALL, 5.0, 2.0, 12.0),
    Constant("layer_traffic", ("megatron-deepspeed",), 0.8, 0.3, 3.0),
    Constant("layer_traffic", ("megatron",), 0.8, 0.3, 3.0),
    Constant("layer_traffic", ("ilm_compile", "llm-foundry"), 1.2, 0.3, 3.0),
    Constant("layer_traffic", ("internevo", "torchtitan"), 1.2, 0.3, 3.0),
    Constant("loss_traffic", ("megatron-deepspeed",), 20.0, 4.0, 80.0),
    Constant("loss_traffic", ("megatron",), 10.0, 4.0, 40.0),
    Constant("loss_traffic", FUSED, 10.0, 4.0, 40.0),
    Constant("gradient_bytes", ALL, 6.0, 2.0, 16.0),
    Constant("host_layer_s", ("megatron-deepspeed",), 1e-3, 2e-4, 3e-3),
    Constant("host_backward", ALL, 0.5, 0.1, 2.0),
    Constant("host_tp", ALL, 0.3, 0.01, 1.0),
    Constant("host_microbatch_s", ALL, 2e-3, 5e-4, 2e-2),
    Constant("host_step_s", ALL, 5e-3, 1e-3, 3e-2),
    Constant("tp_wait_s", ALL, 5e-5, 5e-6, 3e-4),
    Constant("exposed", ALL, 0.3, 0.02, 1.0),
    Constant("network", ("megatron-deepspeed",), 0.3, 0.1, 1.0),
    Constant("network", ("megatron", "llm-foundry", "torchtitan", "ilm_compile"), 0.6, 0.1, 1.0),
    Constant("network", ("internevo",), 0.6, 0.1, 1.0),
    Constant("network_latency_s", ALL, 3e-5, 5e-6, 2e-4),
    Constant("jitter", ALL, 5e-3, 5e-4, 3e-2),
)
MEMORY = (
    Constant("reserved_bytes", ALL, 1e9, 1e8, 6e9),
    Constant("working", ALL, 1.0, 0.1, 3.0),
)
GENERATIONS = {"ampere": AMPERE, "hopper": HOPPER}


def apply(
    values: Sequence[float], steps: Iterable[Step], constants: Sequence[Constant] = CONSTANTS
) -> Iterator[Step]:
    """The steps with `values` for `constants` in their software and hardware."""
    given: dict[str, dict[str, float]] = {}
    for constant, value in zip(constants, values, strict=True):
        for owner in constant.owners:
            given.setdefault(owner, {})[constant.field] = value
    software = {name: replace(row, **given.get(name, {})) for name, row in SOFTWARE.items()}
    efficiency = {row: replace(row, **given.get(name, {})) for name, row in GENERATIONS.items()}
    for step in steps:
        yield replace(
            step,
            software=software[step.software.name],
            hardware=replace(step.hardware, efficiency=efficiency[step.hardware.efficiency]),
        )


class Target(NamedTuple):
    """What is fitted: the fields of a step that was measured and is predicted, and by what."""

    field: str
    predicted: str
    constants: Sequence[Constant]

    def predict(self, values: Sequence[float], steps: Iterable[Step]) -> list[float]:
        """What is predicted of each step with `values` for the constants."""
        return [getattr(step, self.predicted) for step in apply(values, steps, self.constants)]


TIME = Target("seconds", "predicted_s", CONSTANTS)
GIGABYTES = Target("gigabytes", "predicted_gb", MEMORY)


def fit(steps: Sequence[Step], target: Target = TIME) -> list[float]:
    """The values of the target's constants that explain best what was measured."""
    start, low, high = (
        np.log([getattr(constant, name) for constant in target.constants])
        for name in ("start", "low", "high")
    )
    measured = np.log([getattr(step, target.field) for step in steps])

    def residuals(point: np.ndarray) -> np.ndarray:
        predicted = np.log(target.predict(np.exp(point), steps))
        return np.concatenate([predicted - measured, PRIOR * (point - start)])

    found = least_squares(
        residuals,
        start,
        bounds=(low, high),
        loss="soft_l1",
        f_scale=ROBUST,
        diff_step=1e-3,
        max_nfev=40,
    )
    return [float(f"{value:.3g}") for value in np.exp(found.x)]


def unfitted(
    steps: Sequence[Step], groups: Mapping[str, Sequence[int]], target: Target = TIME
) -> list[float]:
    """What is predicted of each step by constants fitted without the group that it is in."""
    predicted = [0.0] * len(steps)
    for members in groups.values():
        values = fit([step for i, step in enumerate(steps) if i not in set(members)], target)
        found = target.predict(values, [steps[i] for i in members])
        for i, value in zip(members, found, strict=True):
            predicted[i] = value
    return predicted


def folds_of(steps: Sequence[Step]) -> dict[str, range]:
    """Each fifth of the steps, by place."""
    count = min(FOLDS, len(steps))
    return {str(n): range(n, len(steps), count) for n in range(count)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, and print."""
    parser = make_parser("fit_costs", __doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--held-out", action="store_true", help="errors on rows not fitted, too")
    options = parser.parse_args(arguments)
    rows = list(map(read_step, read_rows(options.rows)))
    steps, held = ([s for s in rows if getattr(s, t.field)] for t in (TIME, GIGABYTES))
    values = fit(steps)
    lines = [
        (
            constant.field,
            ", ".join(constant.owners),
            f"{value:g}",
            f"{constant.low:g} to {constant.high:g}",
        )
        for constant, value in zip(CONSTANTS, values, strict=True)
    ]
    show_table("Constants", ("constant", "of", "value", "bounds"), lines)
    found = {"all rows fitted": TIME.predict(values, steps)}
    if options.held_out:
        found["each fifth unfitted"] = unfitted(steps, folds_of(steps))
        sources: dict[str, list[int]] = {}
        for i, step in enumerate(steps):
            sources.setdefault(step.source, []).append(i)
        found["each source unfitted"] = unfitted(steps, sources)
    if held and options.held_out:
        errors = [
            abs(gigabytes / (step.gigabytes or 1) - 1)
            for step, gigabytes in zip(held, unfitted(held, folds_of(held), GIGABYTES), strict=True)
        ]
        print(
            f"memory, each fifth unfitted: median error {median(errors):.1%}, largest "
            f"{max(errors):.1%} of {len(held)} rows"
        )
    for title, predicted in found.items():
        show_errors(title, steps, predicted)


if __name__ == "__main__":
    main()

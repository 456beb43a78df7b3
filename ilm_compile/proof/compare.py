"""How far one training step is from another: loss, outputs, gradients and their norm, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ilm_compile.proof.emulate import Step
from ilm_compile.proof.numbers import relative_error

GRADIENT_FLOOR = 1e-5  # of the global norm: some gradients are zero in theory
# AdamW's first step divides by the gradient: it magnifies the rounding of a tiny one.
WEIGHT_SLACK = 100
SHOWN = 4


@dataclass(frozen=True, slots=True)
class Comparison:
    """Relative errors of a step against the expected one, by parameter or output.

    A gradient that the expected step lacks counts too, as does a weight that should have stayed.
    norm: of the gradient norm that the ranks found. Weights tell of it only where it clips.
    """

    loss: float
    gradients: dict[str, float]
    weights: dict[str, float]
    outputs: dict[str, float]
    norm: float = 0.0

    @property
    def max_gradient(self) -> float:
        """The largest error of a gradient."""
        return max(self.gradients.values(), default=0.0)

    @property
    def max_weight(self) -> float:
        """The largest error of an updated weight."""
        return max(self.weights.values(), default=0.0)

    def summary(self) -> str:
        """Return the largest errors as text."""
        return (
            f"loss {self.loss:.0e}, gradient {self.max_gradient:.0e}, weight {self.max_weight:.0e}"
        )

    def wrong_gradients(self, tolerance: float) -> list[str]:
        """The parameters whose gradient is off by more than `tolerance`, in the model's order."""
        return [name for name, error in self.gradients.items() if not error <= tolerance]

    def is_equal(self, tolerance: float) -> bool:
        """Whether everything agrees to `tolerance`."""
        return not self.describe(tolerance)

    def describe(self, tolerance: float) -> str:
        """Return what is off by more than `tolerance`, in words; empty if nothing is."""
        bounds = (
            ("loss", {"": self.loss}, 1),
            ("gradient of ", self.gradients, 1),
            ("the gradient norm", {"": self.norm}, 1),
            ("weight ", self.weights, WEIGHT_SLACK),
            ("output ", self.outputs, 1),
        )
        wrong = [
            f"{kind}{name} by {error:.1e}"
            for kind, errors, slack in bounds
            for name, error in errors.items()
            if not error <= slack * tolerance
        ]
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        return ", ".join(wrong[:SHOWN]) + more


def compare(step: Step, expected: Step) -> Comparison:
    """Return the relative errors of `step`; what it lacks is off by infinity."""
    norms = [gradient.norm() for gradient in expected.gradients.values()]
    norm = torch.stack(norms).double().norm() if norms else torch.ones((), dtype=torch.float64)
    found = norm if step.norm is None else torch.tensor(step.norm, dtype=norm.dtype)
    gradients = dict(expected.gradients)
    for name, extra in step.gradients.items():
        gradients.setdefault(name, torch.zeros_like(extra))
    ours = {name: torch.zeros_like(value) for name, value in gradients.items()}
    ours |= {name: value for name, value in step.gradients.items()}
    return Comparison(
        relative_error(step.loss, expected.loss),
        _errors(ours, gradients, GRADIENT_FLOOR * float(norm)),
        _errors(step.weights, expected.weights),
        _errors(step.outputs, expected.outputs) if step.outputs else {},
        relative_error(found, norm) if norms else 0.0,
    )


def _errors(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float = 1e-12
) -> dict[str, float]:
    return {
        name: relative_error(actual[name], value, floor) if name in actual else float("inf")
        for name, value in expected.items()
    }

"""What a parameter takes on one device all the time: itself, its gradient, Adam's state."""

from __future__ import annotations

from math import prod

import torch
from torch import fx

from ilm_compile.errors import PlanError
from ilm_compile.program.layout import TOKEN_AXES
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program


def static_bytes_per_parameter(dtype: torch.dtype, *, dp: int = 1, zero: int = 1) -> float:
    """Return the bytes per parameter held in `dtype`, on one of `dp` data-parallel ranks.

    A 16-bit parameter is held in float32 (see `ilm_compile.passes.master_weights`), as are its
    gradient and Adam's two moments (float64 for a float64 parameter). `zero` 1 shards the moments
    over dp, 3 everything.
    Raises `PlanError` for another `zero`.
    """
    if zero not in (1, 3):
        raise PlanError(f"cost: zero={zero} is not supported; use 1 or 3")
    held = max(dtype.itemsize, torch.float32.itemsize)
    model, moments = 2 * held, 2 * held
    return (model if zero == 1 else model / dp) + moments / dp


def held_bytes(program: Program, node: fx.Node) -> float:
    """Return the bytes that a rank holds all the time for the variable that `node` gets.

    Itself, its gradient and Adam's state, under the plan's dp and zero; 0 for what is not trained.
    """
    each: float = static_bytes_per_parameter(
        node.meta["val"].dtype, dp=sharing_ranks(program.plan), zero=program.plan.zero
    )
    return float(_trained_elements(program, node) * each)


def gradient_bytes(program: Program, node: fx.Node) -> float:
    """Return what of `held_bytes` is the gradient, which the first backward of a step makes."""
    each: int = max(node.meta["val"].dtype.itemsize, torch.float32.itemsize)
    shards = sharing_ranks(program.plan) if program.plan.zero == 3 else 1
    return _trained_elements(program, node) * each / shards


def sharing_ranks(plan: Plan) -> int:
    """Return how many ranks share the state of a parameter: those that divide the tokens."""
    return (plan.dp or 1) * prod(plan.axes[axis] for axis in TOKEN_AXES)


def _trained_elements(program: Program, node: fx.Node) -> int:
    variable = program.variables[str(node.target)]
    is_trained = variable.is_parameter and variable.requires_grad
    return int(node.meta["val"].numel()) if is_trained else 0

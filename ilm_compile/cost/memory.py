"""What a parameter takes on one device all the time: itself, its gradient, Adam's state."""

from __future__ import annotations

import torch

from ilm_compile.errors import PlanError


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

"""What a parameter takes on one device all the time: itself, its gradient, Adam's state."""

from __future__ import annotations

import torch

from ilm_compile.errors import PlanError


def static_bytes_per_parameter(dtype: torch.dtype, *, dp: int = 1, zero: int = 1) -> float:
    """Return the bytes per parameter held in `dtype`, on one of `dp` data-parallel ranks.

    Gradient, Adam's two moments and, for a 16-bit parameter, its master copy are float32 (float64
    for a float64 parameter). `zero` 1 shards moments and master over dp, 3 everything. For bf16
    that is 6 + 12/dp and 18/dp, as in Megatron-LM (megatron/training/theoretical_memory_usage.py).
    Raises `PlanError` for another `zero`.
    """
    if zero not in (1, 3):
        raise PlanError(f"cost: zero={zero} is not supported; use 1 or 3")
    state = max(dtype.itemsize, torch.float32.itemsize)
    master = state if dtype.itemsize < state else 0
    model = dtype.itemsize + state
    optimizer = 2 * state + master
    return (model if zero == 1 else model / dp) + optimizer / dp

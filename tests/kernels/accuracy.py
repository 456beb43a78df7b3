"""How far a tensor is from what it should be."""

import torch
from torch import Tensor

# Relative to the norm of what is expected. Where the interpreter rounds to bf16 it truncates, which
# doubles the error; float16 and float32 it computes exactly, but adds the numbers of a row that is
# joined with another one by one, where a GPU adds them in a tree.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
INTERPRETED = TOLERANCES | {torch.bfloat16: 2**-6, torch.float32: 2e-6}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`, in float64. NaN if any element is.

    0 if both are zeros or have no elements.
    """
    assert found.shape == expected.shape
    wanted = expected.detach().double()
    difference = found.detach().double() - wanted
    return float(difference.norm() / wanted.norm().clamp(min=1e-300))

"""How often each class occurs, as many classes as are named: bincount of a size that is known."""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define("ilm::counts", "(Tensor values, Tensor? weights, int classes) -> Tensor")


def _counts(values: Tensor, weights: Tensor | None, classes: int) -> Tensor:
    """Return how many `values` (n,) are each of 0 to `classes` - 1, or their summed `weights` (n,).

    As torch.bincount, weights of other types than float32 are summed in float64; unlike there they
    have a gradient, and a value of `classes` or more fails, where the vector would be longer.
    """
    if weights is None:
        each = torch.ones_like(values, dtype=torch.int64)
    else:
        each = weights if weights.dtype == torch.float32 else weights.double()
    return each.new_zeros(classes).scatter_add(0, values.long(), each)


torch.library.impl("ilm::counts", "CompositeImplicitAutograd", _counts)
count_classes = torch.ops.ilm.counts.default

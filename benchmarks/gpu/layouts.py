"""How tensors lie in memory that are not contiguous. Gaps are NaN: reading one is seen."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GAP = 16  # elements, so that rows keep an alignment of 16 bytes


def sliced(x: Tensor) -> Tensor:
    """The first columns of wider rows."""
    return _in_wider_rows(x, 0)


def misaligned(x: Tensor) -> Tensor:
    """Columns from the second on, of rows as wide as nothing divides."""
    return _in_wider_rows(x, 1)


def transposed(x: Tensor) -> Tensor:
    """Dims 0 and -1 have changed places in memory."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def expanded(x: Tensor) -> Tensor:
    """One row, repeated with stride 0 in the first dim that has several."""
    dim = next((i for i, n in enumerate(x.shape[:-1]) if n > 1), 0)
    return x.narrow(dim, 0, 1).expand(x.shape)


def scalar(x: Tensor) -> Tensor:
    """A number, repeated with stride 0 in all dims, as the gradient of a sum is."""
    return torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape)


def _in_wider_rows(x: Tensor, start: int) -> Tensor:
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + GAP + start), math.nan)
    view = wide[..., start : start + x.shape[-1]]
    return view.copy_(x)


# Of the inputs and of the gradients of the outputs.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "contiguous": (Tensor.contiguous, Tensor.contiguous),
    "sliced": (sliced, sliced),
    "transposed": (transposed, transposed),
    "expanded": (expanded, scalar),
    "misaligned": (misaligned, misaligned),
}

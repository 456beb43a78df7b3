"""The op `ilm::grouped_product`: rows, sorted by group, times a matrix for each group.

torch's `grouped_mm` where it takes the numbers (bfloat16, widths of whole 16 bytes), otherwise a
product for each group: float64 is what proofs compute in. The backward is an op of its own.

Shapes in this file: rows (N, K), weights (G, K, M), offs (G,).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import as_written, differentiable

torch.library.define("ilm::grouped_product", "(Tensor rows, Tensor weights, Tensor offs) -> Tensor")
torch.library.define(
    "ilm::grouped_product_backward",
    "(Tensor grad, Tensor rows, Tensor weights, Tensor offs) -> (Tensor, Tensor)",
)
_ALIGNED = 8  # numbers of 16 bits in 16 bytes


def grouped_product(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """Row i times weights[g], where g is the group that row i lies in.

    rows: (N, K); weights: (G, K, M) of the same dtype; offs: (G,) int32, where each group's rows
    end, never falling, the last at N. Returns (N, M). Differentiable once. Raises IlmCompileError
    where shapes or dtypes do not fit.
    """
    result: Tensor = torch.ops.ilm.grouped_product(rows, weights, offs)
    return result


def weights_gradient(grad: Tensor, rows: Tensor, offs: Tensor) -> Tensor:
    """The gradient of the weights alone: (G, K, M) from that of the result (N, M) and the rows."""
    grad, rows = grad.contiguous(), rows.contiguous()
    if _is_native(rows.dtype, rows.shape[1], grad.shape[1]):
        return F.grouped_mm(rows.t(), grad, offs=offs)
    out = rows.new_zeros(len(offs), rows.shape[1], grad.shape[1])  # 0 for a group without rows
    for group, start, stop in _groups(rows, offs):
        torch.mm(rows[start:stop].t(), grad[start:stop], out=out[group])
    return out


def _check(rows: Tensor, weights: Tensor, offs: Tensor) -> None:
    fits = [x.dim() for x in (rows, weights, offs)] == [2, 3, 1]
    fits = fits and rows.shape[1] == weights.shape[1] and weights.shape[0] == offs.shape[0]
    if not fits or rows.dtype != weights.dtype or offs.dtype != torch.int32:
        raise IlmCompileError(
            "ilm::grouped_product: expected rows (N, K) and weights (G, K, M) of one dtype, offs "
            f"(G,) int32; got rows {tuple(rows.shape)} {rows.dtype}, weights "
            f"{tuple(weights.shape)} {weights.dtype}, offs {tuple(offs.shape)} {offs.dtype}"
        )


def _is_native(dtype: torch.dtype, *widths: int) -> bool:
    return dtype == torch.bfloat16 and not any(width % _ALIGNED for width in widths)


def _groups(rows: Tensor, offs: Tensor) -> Iterator[tuple[int, int, int]]:
    """Number, start and stop of each group that has rows."""
    bounds = [0, *offs.tolist()]
    if bounds[-1] != rows.shape[0]:
        raise IlmCompileError(
            f"ilm::grouped_product: expected the last of offs to be the number of rows, "
            f"{rows.shape[0]}, got {bounds[-1]}"
        )
    for group, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            yield group, start, stop


def _forward(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    _check(rows, weights, offs)
    if _is_native(rows.dtype, *weights.shape[1:]):
        return F.grouped_mm(rows.contiguous(), weights, offs=offs)
    out = rows.new_empty(rows.shape[0], weights.shape[2])
    for group, start, stop in _groups(rows, offs):
        torch.mm(rows[start:stop], weights[group], out=out[start:stop])
    return out


def _backward(grad: Tensor, rows: Tensor, weights: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
    grad_rows = _forward(grad.contiguous(), weights.transpose(1, 2), offs)
    return grad_rows, weights_gradient(grad, rows, offs)


def _forward_fake(rows: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    _check(rows, weights, offs)
    return rows.new_empty(rows.shape[0], weights.shape[2])


def _backward_fake(
    grad: Tensor, rows: Tensor, weights: Tensor, offs: Tensor
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.ilm.grouped_product_backward(grad, *ctx.saved_tensors), None


for _device in ("cpu", "cuda"):
    torch.library.impl("ilm::grouped_product", _device, as_written(_forward))
    torch.library.impl("ilm::grouped_product_backward", _device, as_written(_backward))
torch.library.register_fake("ilm::grouped_product", _forward_fake)
torch.library.register_fake("ilm::grouped_product_backward", _backward_fake)
differentiable("ilm::grouped_product", _save_inputs, _differentiate)

"""The op `ilm::rotary`: rotary positions of queries and keys, in one launch on CUDA.

RoFormer (arXiv:2104.09864). This file holds the schema, the shape contract and the torch reference;
the Triton kernel is in triton_rotary.py and is imported when the first CUDA tensor comes. The
backward is a rotation by the negative angle, an op of its own.

Shapes in this file: B batch, S tokens per row, H query heads, G key heads, D head size, W pairs.
"""

from typing import Any

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import differentiable, implement
from ilm_compile.kernels.rotation import check_tables, pick_angles, refuse_gradient, rotate_pairs

_TABLES = "Tensor cos, Tensor sin, Tensor? position_ids"
torch.library.define(
    "ilm::rotary",
    f"(Tensor q, Tensor k, {_TABLES}=None, bool interleaved=False) -> (Tensor, Tensor)",
)
torch.library.define(
    "ilm::rotary_backward",
    f"(Tensor grad_q, Tensor grad_k, {_TABLES}, bool interleaved) -> (Tensor, Tensor)",
)


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotate the pairs of every query and key head by the angles of their token.

    q: (B, S, H, D); k: (B, S, G, D), of any strides and one dtype. cos, sin: (B or 1, S, W), or
    tables (T, W) of which token t takes row position_ids[t]; position_ids: (B or 1, S) integers in
    [0, T): one outside raises on CPU and makes NaN on CUDA. A pair is (i, i + W), with
    `interleaved` (2i, 2i + 1), and the rotated numbers are in the places of the old ones; numbers
    from 2 W on stay as they are. Computed in float32 (float64 stays) and rounded once.

    Returns q and k rotated, contiguous, in the dtype of q. No gradient reaches cos and sin. Raises
    IlmCompileError where shapes or dtypes do not fit, or where cos or sin ask for a gradient.
    """
    result: tuple[Tensor, Tensor] = torch.ops.ilm.rotary(q, k, cos, sin, position_ids, interleaved)
    return result


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise IlmCompileError(
            "ilm::rotary: expected q (batch, seq, heads, head_dim) and k (batch, seq, kv_heads, "
            f"head_dim); got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    if q.dtype != k.dtype:
        raise IlmCompileError(
            f"ilm::rotary: expected q and k of one dtype; got q {q.dtype}, k {k.dtype}"
        )
    check_tables("ilm::rotary", q, cos, sin, position_ids, q.shape[3])


def _forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin, position_ids)
    cos, sin = (pick_angles(table, position_ids) for table in (cos, sin))
    return rotate_pairs(q, cos, sin, interleaved), rotate_pairs(k, cos, sin, interleaved)


def _backward(
    grad_q: Tensor,
    grad_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """A rotation is orthogonal: its transpose turns back."""
    return _forward(grad_q, grad_k, cos, -sin, position_ids, interleaved)


def _fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin, position_ids)
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save_tables(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, position_ids, interleaved = inputs
    refuse_gradient("ilm::rotary", cos, sin)
    ctx.save_for_backward(cos, sin, position_ids)
    ctx.interleaved = interleaved


def _differentiate(
    ctx: Any, grad_q: Tensor, grad_k: Tensor
) -> tuple[Tensor, Tensor, None, None, None, None]:
    cos, sin, position_ids = ctx.saved_tensors
    grads = torch.ops.ilm.rotary_backward(grad_q, grad_k, cos, sin, position_ids, ctx.interleaved)
    return *grads, None, None, None, None


implement("ilm::rotary", _forward, "ilm_compile.kernels.triton_rotary:rotary")
implement("ilm::rotary_backward", _backward, "ilm_compile.kernels.triton_rotary:rotary_backward")
torch.library.register_fake("ilm::rotary", _fake)
torch.library.register_fake("ilm::rotary_backward", _fake)
differentiable("ilm::rotary", _save_tables, _differentiate)

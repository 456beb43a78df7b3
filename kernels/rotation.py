"""What `ilm::rotary` and `ilm::qkv_rotary` share: their tables, and the rotation in plain torch.

Shapes in this file: B batch, S tokens per row, D head size, W pairs that are rotated (2 W <= D), T
rows of a table that positions index.
"""

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import exact_dtype

POSITIONS = ((2, torch.int32), (2, torch.int64))  # dims and dtype of position_ids


def check_tables(
    op: str, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None, head_dim: int
) -> None:
    """Refuse tables that do not fit `x`, whose first two dims are (B, S)."""

    def refuse(expected: str) -> IlmCompileError:
        got = f"tokens {tuple(x.shape[:2])}, head_dim {head_dim}, cos {tuple(cos.shape)}"
        got += f" {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype}"
        if position_ids is not None:
            got += f", position_ids {tuple(position_ids.shape)} {position_ids.dtype}"
        return IlmCompileError(f"{op}: expected {expected}; got {got}")

    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise refuse("cos and sin of one shape and dtype")
    if not x.is_floating_point() or not cos.is_floating_point():
        raise refuse(f"floating point numbers and tables, not {x.dtype} and {cos.dtype}")
    if cos.dim() != (3 if position_ids is None else 2):
        raise refuse("cos, sin (batch or 1, seq, pairs), or (positions, pairs) with position_ids")
    if 2 * cos.shape[-1] > head_dim:
        raise refuse("no more than head_dim / 2 pairs in the last dim of cos and sin")
    if position_ids is not None and (position_ids.dim(), position_ids.dtype) not in POSITIONS:
        raise refuse("position_ids (batch or 1, seq) of int32 or int64")
    rows = cos if position_ids is None else position_ids
    if rows.shape[1] != x.shape[1] or rows.shape[0] not in (1, x.shape[0]):
        raise refuse("angles for each token, or for each token of one row")


def refuse_gradient(op: str, cos: Tensor, sin: Tensor) -> None:
    """The ops give cos and sin no gradient: one that is asked for would be lost without a word."""
    if cos.requires_grad or sin.requires_grad:
        raise IlmCompileError(
            f"{op}: expected cos and sin that need no gradient, for it computes none; "
            "detach them, or rotate with plain torch ops"
        )


def pick_angles(table: Tensor, position_ids: Tensor | None) -> Tensor:
    """Rows of a table for each token: (B or 1, S, W). A position outside the table raises."""
    if position_ids is None:
        return table
    rows = table.index_select(0, position_ids.reshape(-1))
    return rows.reshape(*position_ids.shape, table.shape[-1])


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn each pair (a, b) of a head to (a cos - b sin, b cos + a sin).

    x: (B, S, ..., D). cos, sin: (B or 1, S, W). Pair i is (i, i + W), or (2i, 2i + 1) with
    `interleaved`, and stays in its place; numbers from 2 W on are copied. Computed in float32, or
    in float64 where x or the tables have it, and rounded once. The result is contiguous.
    """
    exact = exact_dtype(x, cos)
    pairs = cos.shape[-1]
    heads = (1,) * (x.dim() - 3)
    cos, sin = (t.to(exact).reshape(*t.shape[:2], *heads, pairs) for t in (cos, sin))
    if interleaved:
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    a, b = x[..., first].to(exact), x[..., second].to(exact)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out[..., first] = a * cos - b * sin
    out[..., second] = b * cos + a * sin
    out[..., 2 * pairs :] = x[..., 2 * pairs :]
    return out

"""The op `ilm::qkv_rotary`: InternLM2's packed projection to rotated queries, rotated keys, values.

One launch on CUDA reads the projection and writes q, k and v; the backward, an op of its own,
writes the whole gradient of the projection in one launch, where plain torch would add three
zero-padded slices. The packing is InternEvo's "(h gs d)"
(internlm/model/modeling_internlm2.py): `ilm_compile.models.internlm2` has the same.

v is a copy, though an attention could read it in the projection: saved for the backward, a view of
1 head in R + 2 would keep all of them, 6 times the bytes of v where 4 queries share a key, and so
nearly double what the attention saves (q, k, v); and the gradient of v would be added to that of
the rest by one pass more over all of it.

Shapes in this file: B batch, S tokens per row, G key heads, R query heads of each, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import differentiable, implement
from ilm_compile.kernels.rotation import check_tables, pick_angles, refuse_gradient, rotate_pairs

_TABLES = "Tensor cos, Tensor sin, Tensor? position_ids"
torch.library.define(
    "ilm::qkv_rotary",
    f"(Tensor qkv, {_TABLES}=None, bool interleaved=False) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ilm::qkv_rotary_backward",
    f"(Tensor grad_q, Tensor grad_k, Tensor grad_v, {_TABLES}, bool interleaved) -> Tensor",
)


def qkv_rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection and rotate its queries and keys.

    qkv: (B, S, G, R + 2, D): of each group the R query heads, the key, the value; any strides.
    cos, sin, position_ids and `interleaved` as `rotary` takes them. Returns q (B, S, G * R, D), k
    and v (B, S, G, D), contiguous, in the dtype of qkv.

    With `interleaved` the rotated numbers stay in their places, (2i, 2i + 1). A model that first
    sorts q and k into halves (InternLM2 with adapt_hf=False) has the same attention scores, for
    both are permuted alike. Raises IlmCompileError as `rotary` does.
    """
    result: tuple[Tensor, Tensor, Tensor]
    result = torch.ops.ilm.qkv_rotary(qkv, cos, sin, position_ids, interleaved)
    return result


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> None:
    if qkv.dim() != 5 or qkv.shape[3] < 3:
        raise IlmCompileError(
            "ilm::qkv_rotary: expected qkv (batch, seq, kv_heads, q_per_kv + 2, head_dim); got "
            f"{tuple(qkv.shape)}"
        )
    check_tables("ilm::qkv_rotary", qkv, cos, sin, position_ids, qkv.shape[4])


def _forward(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(qkv, cos, sin, position_ids)
    cos, sin = (pick_angles(table, position_ids) for table in (cos, sin))
    q = rotate_pairs(qkv[:, :, :, :-2], cos, sin, interleaved).flatten(2, 3)
    k = rotate_pairs(qkv[:, :, :, -2], cos, sin, interleaved)
    return q, k, qkv[:, :, :, -1].clone(memory_format=torch.contiguous_format)


def _backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
) -> Tensor:
    cos, sin = pick_angles(cos, position_ids), -pick_angles(sin, position_ids)
    grad = _backward_fake(grad_q, grad_k, grad_v, cos, sin, None, interleaved)
    turned = rotate_pairs(grad_q, cos, sin, interleaved)
    grad[:, :, :, :-2] = turned.reshape(grad[:, :, :, :-2].shape)
    grad[:, :, :, -2] = rotate_pairs(grad_k, cos, sin, interleaved)
    grad[:, :, :, -1] = grad_v
    return grad


def _forward_fake(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(qkv, cos, sin, position_ids)
    batch, seq, kv_heads, packed, head_dim = qkv.shape
    q = qkv.new_empty((batch, seq, kv_heads * (packed - 2), head_dim))
    return q, *(qkv.new_empty((batch, seq, kv_heads, head_dim)) for _ in range(2))  # type: ignore[return-value]


def _backward_fake(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
) -> Tensor:
    batch, seq, kv_heads, head_dim = grad_k.shape
    return grad_q.new_empty((batch, seq, kv_heads, grad_q.shape[2] // kv_heads + 2, head_dim))


def _save_tables(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, cos, sin, position_ids, interleaved = inputs
    refuse_gradient("ilm::qkv_rotary", cos, sin)
    ctx.save_for_backward(cos, sin, position_ids)
    ctx.interleaved = interleaved


def _differentiate(
    ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
) -> tuple[Tensor, None, None, None, None]:
    grads = (grad_q, grad_k, grad_v)
    grad: Tensor = torch.ops.ilm.qkv_rotary_backward(*grads, *ctx.saved_tensors, ctx.interleaved)
    return grad, None, None, None, None


implement("ilm::qkv_rotary", _forward, "ilm_compile.kernels.triton_qkv_rotary:qkv_rotary")
implement(
    "ilm::qkv_rotary_backward",
    _backward,
    "ilm_compile.kernels.triton_qkv_rotary:qkv_rotary_backward",
)
torch.library.register_fake("ilm::qkv_rotary", _forward_fake)
torch.library.register_fake("ilm::qkv_rotary_backward", _backward_fake)
differentiable("ilm::qkv_rotary", _save_tables, _differentiate)

"""`ilm::rotary` in Triton: q and k in one launch, forward and backward. Import it lazily.

Shapes in this file: q (B, S, H, D), k (B, S, G, D), cos and sin as in rotary.py.
"""

# Triton types neither its decorator nor what a kernel sees of its arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from ilm_compile.kernels.launch import device_of
from ilm_compile.kernels.triton_rotation import (
    COUNTS,
    WARPS,
    addressable,
    angle_arguments,
    angles,
    place,
    strides,
    tile_for,
    turn,
)


@triton.jit(do_not_specialize=COUNTS)
def rotary_kernel(
    q,
    k,
    q_out,
    k_out,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    num_tokens,
    seq,
    cos,
    sin,
    positions,
    num_positions,
    batch_stride,
    row_stride,
    position_batch_stride,
    position_stride,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """The slots of a token are the heads of q, then those of k."""
    SLOTS: tl.constexpr = Q_HEADS + K_HEADS
    DIM: tl.constexpr = 2 * PAIRS + REST
    index, batch, token, slot, inside = place(num_tokens, seq, SLOTS, TOKENS, HEADS)
    c, s = angles(
        *(cos, sin, positions, batch, token, num_positions, batch_stride, row_stride),
        *(position_batch_stride, position_stride, inside, PAIRS, BACKWARD, BLOCK),
    )
    is_q = slot < Q_HEADS
    head = slot - Q_HEADS
    q_source = q + batch * q_batch_stride + token * q_token_stride + slot * q_head_stride
    k_source = k + batch * k_batch_stride + token * k_token_stride + head * k_head_stride
    q_target = q_out + (index * Q_HEADS + slot) * DIM
    k_target = k_out + (index * K_HEADS + head) * DIM
    source = tl.where(is_q, q_source, k_source)
    target = tl.where(is_q, q_target, k_target)
    mask = inside & (slot < SLOTS)
    turn(
        *(source, target, mask, None, c, s),
        *(PAIRS, REST, INTERLEAVED, TOKENS, HEADS, BLOCK, REST_BLOCK),
    )


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """`ilm::rotary` of any strides. Returns q and k turned, contiguous."""
    return _launch(q, k, cos, sin, position_ids, interleaved, backward=False)


def rotary_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """`ilm::rotary_backward`: both gradients turned back, contiguous."""
    return _launch(grad_q, grad_k, cos, sin, position_ids, interleaved, backward=True)


def _launch(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
    *,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    batch, seq, q_heads, head_dim = q.shape
    k_heads = k.shape[2]
    tile = tile_for(cos.shape[-1], head_dim, q_heads + k_heads)
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    q, k = addressable(q), addressable(k)
    with device_of(q):
        rotary_kernel[(tile.programs(batch * seq, q_heads + k_heads),)](
            q,
            k,
            q_out,
            k_out,
            *strides(q),
            *strides(k),
            num_tokens=batch * seq,
            seq=seq,
            **angle_arguments(cos, sin, position_ids),
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            INTERLEAVED=interleaved,
            BACKWARD=backward,
            **tile._asdict(),
            num_warps=WARPS,
        )
    return q_out, k_out

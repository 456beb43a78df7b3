"""`ilm::qkv_rotary` in Triton: a packed projection in one launch, forward and backward.

Import it lazily. Shapes in this file: qkv (B, S, G, R + 2, D); q (B, S, G * R, D); k, v
(B, S, G, D); cos and sin as in rotary.py. The slots of a token are the heads of qkv in order.
"""

# Triton types neither its decorator nor what a kernel sees of its arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

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
def forward_kernel(
    qkv,
    q,
    k,
    v,
    qkv_batch_stride,
    qkv_token_stride,
    group_stride,
    member_stride,
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
    GROUPS: tl.constexpr,
    Q_PER_KV: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    SLOTS: tl.constexpr = GROUPS * (Q_PER_KV + 2)
    DIM: tl.constexpr = 2 * PAIRS + REST
    index, batch, token, slot, inside = place(num_tokens, seq, SLOTS, TOKENS, HEADS)
    c, s = angles(
        *(cos, sin, positions, batch, token, num_positions, batch_stride, row_stride),
        *(position_batch_stride, position_stride, inside, PAIRS, False, BLOCK),
    )
    group, member = slot // (Q_PER_KV + 2), slot % (Q_PER_KV + 2)
    head = group * Q_PER_KV + member
    source = qkv + batch * qkv_batch_stride + token * qkv_token_stride
    source += group * group_stride + member * member_stride
    q_target = q + (index * (GROUPS * Q_PER_KV) + head) * DIM
    place_kv = (index * GROUPS + group) * DIM
    target = tl.where(member == Q_PER_KV, k + place_kv, v + place_kv)
    target = tl.where(member < Q_PER_KV, q_target, target)
    turn(
        *(source, target, inside & (slot < SLOTS), member <= Q_PER_KV, c, s),
        *(PAIRS, REST, INTERLEAVED, TOKENS, HEADS, BLOCK, REST_BLOCK),
    )


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_q,
    grad_k,
    grad_v,
    grad_qkv,
    q_batch_stride,
    q_token_stride,
    q_head_stride,
    k_batch_stride,
    k_token_stride,
    k_head_stride,
    v_batch_stride,
    v_token_stride,
    v_head_stride,
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
    GROUPS: tl.constexpr,
    Q_PER_KV: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    SLOTS: tl.constexpr = GROUPS * (Q_PER_KV + 2)
    DIM: tl.constexpr = 2 * PAIRS + REST
    index, batch, token, slot, inside = place(num_tokens, seq, SLOTS, TOKENS, HEADS)
    c, s = angles(
        *(cos, sin, positions, batch, token, num_positions, batch_stride, row_stride),
        *(position_batch_stride, position_stride, inside, PAIRS, True, BLOCK),
    )
    group, member = slot // (Q_PER_KV + 2), slot % (Q_PER_KV + 2)
    head = group * Q_PER_KV + member
    q_source = grad_q + batch * q_batch_stride + token * q_token_stride + head * q_head_stride
    k_source = grad_k + batch * k_batch_stride + token * k_token_stride + group * k_head_stride
    v_source = grad_v + batch * v_batch_stride + token * v_token_stride + group * v_head_stride
    source = tl.where(member == Q_PER_KV, k_source, v_source)
    source = tl.where(member < Q_PER_KV, q_source, source)
    target = grad_qkv + (index * SLOTS + slot) * DIM
    turn(
        *(source, target, inside & (slot < SLOTS), member <= Q_PER_KV, c, s),
        *(PAIRS, REST, INTERLEAVED, TOKENS, HEADS, BLOCK, REST_BLOCK),
    )


def qkv_rotary(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ilm::qkv_rotary` of any strides. Returns q, k, v, contiguous."""
    batch, seq, groups, packed, head_dim = qkv.shape
    q = qkv.new_empty((batch, seq, groups * (packed - 2), head_dim))
    k, v = (qkv.new_empty((batch, seq, groups, head_dim)) for _ in range(2))
    tile = tile_for(cos.shape[-1], head_dim, groups * packed)
    if qkv.numel() == 0:
        return q, k, v
    qkv = addressable(qkv)
    with device_of(qkv):
        forward_kernel[(tile.programs(batch * seq, groups * packed),)](
            *(qkv, q, k, v),
            *strides(qkv),
            num_tokens=batch * seq,
            seq=seq,
            **angle_arguments(cos, sin, position_ids),
            GROUPS=groups,
            Q_PER_KV=packed - 2,
            INTERLEAVED=interleaved,
            **tile._asdict(),
            num_warps=WARPS,
        )
    return q, k, v


def qkv_rotary_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    interleaved: bool,
) -> Tensor:
    """`ilm::qkv_rotary_backward`: the gradient of the packed projection, contiguous."""
    batch, seq, groups, head_dim = grad_k.shape
    packed = grad_q.shape[2] // groups + 2
    grad_qkv = grad_q.new_empty((batch, seq, groups, packed, head_dim))
    tile = tile_for(cos.shape[-1], head_dim, groups * packed)
    if grad_qkv.numel() == 0:
        return grad_qkv
    grads = [addressable(x) for x in (grad_q, grad_k, grad_v)]
    with device_of(grad_q):
        backward_kernel[(tile.programs(batch * seq, groups * packed),)](
            *(*grads, grad_qkv),
            *(stride for x in grads for stride in strides(x)),
            num_tokens=batch * seq,
            seq=seq,
            **angle_arguments(cos, sin, position_ids),
            GROUPS=groups,
            Q_PER_KV=packed - 2,
            INTERLEAVED=interleaved,
            **tile._asdict(),
            num_warps=WARPS,
        )
    return grad_qkv

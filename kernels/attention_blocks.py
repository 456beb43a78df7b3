"""A block of attention: some queries over some of the keys that they see.

The results of blocks are put together by the logarithm of the sum of exponentials of each query's
scores in each of them. That of all keys together gives the gradients of every block by itself
(FlashAttention, arXiv:2205.14135, section 3.1; Ring Attention, arXiv:2310.01889).

Shapes in this file: q (B, H, N, D), k (B, G, M, D), v (B, G, M, E), H a multiple of G; lse
(B, H, N), -inf for a query that sees no key of the block. A mask broadcasts to (B, H, N, M).
Written out, scores of a few queries are held at a time; a kernel holds none.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ilm_compile.kernels.attention_backends import (
    FLASH_CAPABILITY,
    FLASH_DTYPES,
    FLASH_HEAD_DIM,
)
from ilm_compile.kernels.attention_reference import CHUNK
from ilm_compile.kernels.library import exact_dtype

aten = torch.ops.aten
Kernel: TypeAlias = tuple[Callable[..., Any], Callable[..., Any]]


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add a block's result to `out` and `lse`, what was found so far, in place."""
    total = torch.logaddexp(lse, more_lse)
    whole = seen(total)
    out.mul_((lse - whole).exp_().unsqueeze(-1))
    out.add_(more * (more_lse - whole).exp_().unsqueeze(-1))
    lse.copy_(total)


def seen(lse: Tensor) -> Tensor:
    """Return `lse` with 0 for queries that see no key: their probabilities are then 0, not nan."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the result (B, H, N, E) and lse; causal: of N = M tokens, each to those before."""
    kernel = _kernel(q, v, mask)
    return (kernel[0] if kernel else _forward)(q, k, v, mask, scale, causal)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    grad_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; `out` and `lse`, as `seen`, are of all keys together.

    grad_mask: where the mask's gradient is added, of its shape.
    """
    kernel = _kernel(q, v, mask)
    if kernel is None:
        return _backward(grad, q, k, v, out, lse, mask, scale, causal, grad_mask)
    grad_q, grad_k, grad_v = kernel[1](grad, q, k, v, out, lse, scale, causal)
    return grad_q, grad_k, grad_v


def _kernel(q: Tensor, v: Tensor, mask: Tensor | None) -> Kernel | None:
    """What takes such a block forward and backward, if any kernel does."""
    if mask is not None or q.shape[-1] != v.shape[-1]:
        return None
    dim, capability = q.shape[-1], _capability(q.device)
    fits = q.dtype in FLASH_DTYPES and dim <= FLASH_HEAD_DIM and dim % 8 == 0
    if capability is not None and not (fits and capability >= FLASH_CAPABILITY):
        return None
    return KERNELS.get(q.device.type)


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool, first: int
) -> Tensor:
    """Return the scores (B, H, n, M) of queries from `first` on, -inf where one sees not."""
    grouped = (q * scale).reshape(len(q), k.shape[1], -1, q.shape[-1])
    scores = (grouped @ k.mT).view(*q.shape[:-1], k.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(hidden.triu(first + 1), float("-inf"))
    return scores


def _parts(q: Tensor, k: Tensor) -> list[tuple[int, slice]]:
    width = max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return [(start, slice(start, start + width)) for start in range(0, q.shape[2], width)]


def _rows(mask: Tensor | None, part: slice) -> Tensor | None:
    """The rows of a mask for some queries; a view."""
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., part, :]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    query, key, value = (x.to(exact_dtype(q)) for x in (q, k, v))
    outs, lses = [], []
    for start, part in _parts(q, k):
        scores = _scores(query[:, :, part], key, _rows(mask, part), scale, causal, start)
        lse = scores.logsumexp(-1)
        weights = (scores - seen(lse).unsqueeze(-1)).exp_()
        grouped = weights.view(len(q), k.shape[1], -1, k.shape[2])
        outs.append((grouped @ value).view(*scores.shape[:-1], v.shape[-1]))
        lses.append(lse)
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    grad_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """With P the probabilities and dP = dO V': dV = P' dO, dS = P * (dP - sum(dO * O))."""
    grad, query, key, value = (x.to(exact_dtype(q)) for x in (grad, q, k, v))
    shared = (grad * out).sum(-1, keepdim=True)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (query, key, value))
    groups = (len(q), k.shape[1], -1)
    for start, part in _parts(q, k):
        asked, grad_out = query[:, :, part], grad[:, :, part].reshape(*groups, v.shape[-1])
        scores = _scores(asked, key, _rows(mask, part), scale, causal, start)
        weights = (scores - lse[:, :, part].unsqueeze(-1)).exp_()
        grad_v += weights.view(*groups, k.shape[2]).mT @ grad_out
        grad_weights = (grad_out @ value.mT).view(weights.shape)
        grad_scores = weights.mul_(grad_weights.sub_(shared[:, :, part]))
        if grad_mask is not None:
            into = _rows(grad_mask, part)
            into.add_(grad_scores.sum_to_size(into.shape))  # type: ignore[union-attr]
        grouped = grad_scores.view(*groups, k.shape[2])
        grad_q[:, :, part] = (grouped @ key).view(asked.shape) * scale
        grad_k += grouped.mT @ asked.reshape(*groups, q.shape[-1]) * scale
    return grad_q, grad_k, grad_v


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    run = aten._scaled_dot_product_flash_attention_for_cpu.default
    return tuple(run(q, k, v, 0.0, causal, scale=scale))


def _cpu_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, ...]:
    run = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return tuple(run(grad, q, k, v, out, lse, 0.0, causal, scale=scale))


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    run = aten._scaled_dot_product_flash_attention.default  # takes grouped keys as they are
    out, lse, *_ = run(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _cuda_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, ...]:
    run = aten._scaled_dot_product_flash_attention_backward.default
    state = [torch.empty(n, dtype=torch.uint64, device=q.device) for n in (2, ())]  # of dropout
    lengths = None, None, q.shape[2], k.shape[2], 0.0, causal
    return tuple(run(grad, q, k, v, out, lse, *lengths, *state, scale=scale))


# By device: what takes a block without a mask, forward and backward.
KERNELS: dict[str, Kernel] = {
    "cpu": (_cpu_forward, _cpu_backward),
    "cuda": (_cuda_forward, _cuda_backward),
}

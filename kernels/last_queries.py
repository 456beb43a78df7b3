"""Causal attention of queries that are the last of those that the keys have.

A rank that holds a run of the queries of a sequence gives it every key up to the end of the run, so
that no key is read that all of them would mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def attend_last(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Return the attention of the last n of m tokens over all before them, each to itself.

    q: (..., n, D), k: (..., m, D), v: (..., m, E); returns (..., n, E).
    """
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    if q.is_cuda:  # its kernels know this mask, and do not read it
        from torch.nn.attention.bias import causal_lower_right  # imports triton

        mask: Tensor = causal_lower_right(num_queries, num_keys)
    else:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
        mask = mask.tril(num_keys - num_queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


class _WithoutMask(torch.autograd.Function):
    """`attend_last` that keeps its inputs alone: autograd would keep n * m numbers of a mask."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None, enable_gqa: bool
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = {"scale": scale, "enable_gqa": enable_gqa}
        return attend_last(q, k, v, **ctx.options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out = attend_last(q, k, v, **ctx.options)
        return *torch.autograd.grad(out, (q, k, v), grad), None, None


def attend_last_keeping_inputs(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Return what `attend_last` does; where it makes a mask, it is made again in backward."""
    if q.is_cuda or q.shape[-2] == k.shape[-2]:
        return attend_last(q, k, v, scale=scale, enable_gqa=enable_gqa)
    found: Tensor = _WithoutMask.apply(q, k, v, scale, enable_gqa)  # type: ignore[no-untyped-call]
    return found

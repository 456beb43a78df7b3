"""Causal attention of queries that are the last of those that the keys have, in documents or not.

A rank that holds a run of the queries of a sequence gives it every key up to the end of the run, so
that no key is read that all of them would mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.kernels.documents import document_ids


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
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return _masked(q, k, v, None, **options)


def attend_last_keeping_inputs(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Return what `attend_last` does; where it makes a mask, it is made again in backward."""
    if q.is_cuda or q.shape[-2] == k.shape[-2]:
        return attend_last(q, k, v, scale=scale, enable_gqa=enable_gqa)
    return _without_mask(q, k, v, None, scale, enable_gqa)


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, *, scale: float | None, enable_gqa: bool
) -> Tensor:
    """Return `attend_last` inside each document; the mask is made again in backward, not kept.

    q: (rows, H, n, D), k: (rows, G, m, D), v: (rows, G, m, E); returns (rows, H, n, E).
    documents: (sides, rows, n + 1), of one run of queries (`ilm_compile.kernels.documents`).
    """
    return _without_mask(q, k, v, documents, scale, enable_gqa)


def _masked(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, **options: Any) -> Tensor:
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    mask = mask.tril_(num_keys - num_queries)
    if documents is not None:
        asked = document_ids(documents[0], num_queries)[:, None, :, None]
        mask = mask.logical_and(asked == document_ids(documents[-1], num_keys)[:, None, None, :])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


class _WithoutMask(torch.autograd.Function):
    """`_masked` that keeps its inputs alone: autograd would keep n * m numbers of a mask."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Tensor | None,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, documents)
        ctx.options = {"scale": scale, "enable_gqa": enable_gqa}
        return _masked(q, k, v, documents, **ctx.options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, documents = ctx.saved_tensors
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        with torch.enable_grad():
            out = _masked(q, k, v, documents, **ctx.options)
        return *torch.autograd.grad(out, (q, k, v), grad), None, None, None


def _without_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    given = q, k, v, documents, scale, enable_gqa
    found: Tensor = _WithoutMask.apply(*given)  # type: ignore[no-untyped-call]
    return found

"""The torch reference of `ilm::attention`, forward and backward, one document at a time.

Memory is linear in the tokens: the backward holds CHUNK scores at a time, for as many key heads at
once as fit, and of a long document for so many queries at a time.

Shapes in this file: B batch, S tokens per row, H query heads, G key and value heads, D head size;
of one document L tokens whose keys are read by the last N queries of them, P pairs of a row and a
key head, R = H / G query heads of each key head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ilm_compile.kernels.documents import fold, queries
from ilm_compile.kernels.last_queries import attend_last
from ilm_compile.kernels.library import exact_dtype

# Scores held at a time: 16 MiB in float32, of which the backward has about four.
CHUNK = 2**22


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    tokens: Sequence[int] | None = None,
) -> Tensor:
    """Causal attention inside each document, of the shape of q, contiguous."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q_fold, k_fold, v_fold, result = (fold(x, cu_seqlens) for x in (q, k, v, out))
    for rows, asked, seen in queries(k, cu_seqlens, tokens):
        query = q_fold[rows, asked].transpose(1, 2)
        key, value = (x[rows, seen].transpose(1, 2) for x in (k_fold, v_fold))
        grouped = q.shape[2] != k.shape[2]
        found = attend_last(query, key, value, scale=scale, enable_gqa=grouped)
        result[rows, asked] = found.transpose(1, 2)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    tokens: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, from probabilities that are computed again.

    With P = softmax(scale Q K'), O = P V and dP = dO V': dV = P' dO, dS = P * (dP - sum(dP * P)),
    dQ = scale dS K, dK = scale dS' Q (FlashAttention, arXiv:2205.14135, appendix B). Written out
    because torch.autograd is switched off inside an op that runs under a dispatch mode.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    outs = [torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    given, results = ([fold(x, cu_seqlens) for x in xs] for xs in ((grad, q, k, v), outs))
    for rows, asked, seen in queries(k, cu_seqlens, tokens):
        places = (asked, asked, seen, seen)
        parts = (x[rows, place] for x, place in zip(given, places, strict=True))
        for result, place, x in zip(
            results, places[1:], _document_backward(*parts, scale=scale), strict=True
        ):
            result[rows, place] += x
    grad_q, grad_k, grad_v = outs
    return grad_q, grad_k, grad_v


def _document_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one document: q (rows, N, H, D), k and v (rows, L, G, D)."""
    exact = exact_dtype(q)
    rows, length, kv_heads, dim = k.shape
    asked, shared = q.shape[1], q.shape[2] // kv_heads
    grouped = (rows, asked, kv_heads, shared, dim)
    # (P, R, N, D) and (P, L, D): each pair is a problem of its own.
    grad_out, query = (
        x.to(exact).reshape(grouped).permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (grad, q)
    )
    key, value = (x.to(exact).transpose(1, 2).flatten(0, 1) for x in (k, v))
    grad_query, grad_key, grad_value = (
        torch.zeros(x.shape, dtype=exact, device=x.device) for x in (query, key, value)
    )
    row_of_scores = max(shared * length, 1)
    num_pairs = max(CHUNK // (row_of_scores * max(length, 1)), 1)
    num_queries = max(CHUNK // row_of_scores, 1)
    for first in range(0, len(key), num_pairs):
        pairs = slice(first, first + num_pairs)
        for start in range(0, asked, num_queries):
            stop = min(start + num_queries, asked)
            part = (pairs, slice(None), slice(start, stop))
            seen = (pairs, slice(0, length - asked + stop))
            grads = _block_backward(grad_out[part], query[part] * scale, key[seen], value[seen])
            grad_query[part] = grads[0] * scale
            grad_key[seen] += grads[1]
            grad_value[seen] += grads[2]
    grad_query = grad_query.view(rows, kv_heads, shared, asked, dim).permute(0, 3, 1, 2, 4)
    grad_key, grad_value = (
        x.view(rows, kv_heads, length, dim).transpose(1, 2) for x in (grad_key, grad_value)
    )
    return grad_query.flatten(2, 3), grad_key, grad_value


def _block_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of scaled queries (P, R, n, D), the last n that read keys and values (P, m, D)."""
    pairs, shared, num_queries, dim = query.shape
    num_keys = key.shape[1]
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=key.device)
    hidden = hidden.triu_(num_keys - num_queries + 1)
    query, grad = (x.reshape(pairs, shared * num_queries, dim) for x in (query, grad))
    scores = query @ key.mT
    scores.view(pairs, shared, num_queries, num_keys).masked_fill_(hidden, float("-inf"))
    probabilities = scores.softmax(-1)
    # In place from here: these matrices are nearly all of the time and the memory.
    grad_scores = torch.matmul(grad, value.mT, out=scores)
    grad_scores -= (grad_scores * probabilities).sum(-1, keepdim=True)
    grad_scores *= probabilities
    grad_query = (grad_scores @ key).view(pairs, shared, num_queries, dim)
    return grad_query, grad_scores.mT @ query, probabilities.mT @ grad

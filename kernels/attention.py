"""The op `ilm::attention`: causal attention that never looks across a document boundary.

One graph node whatever computes it. This file holds the schema, the shape contract and the torch
reference, which runs on CPU and CUDA alike; its backward is an op of its own, so a joint graph
shows both.

Shapes in this file: B batch, S tokens per row, H query heads, G key and value heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError

torch.library.define(
    "ilm::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens=None, float? scale=None) -> Tensor",
)
torch.library.define(
    "ilm::attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float? scale)"
    " -> (Tensor, Tensor, Tensor)",
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of every query over the keys before it in the same document.

    q: (B, S, H, D); k, v: (B, S, G, D), H a multiple of G: query head j reads key head
    j // (H // G). cu_seqlens: None (each row is one document), or integers, either (B, n): where
    the documents of each row start, beginning at 0 and padded with S, or (n,): the same over the
    flattened B*S tokens, padded with B*S. scale: multiplies the scores, 1/sqrt(D) when None.
    Returns (B, S, H, D) in the dtype of q.
    """
    result: Tensor = torch.ops.ilm.attention(q, k, v, cu_seqlens, scale)
    return result


def document_starts(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Index of the first token of the document that each token belongs to.

    cu_seqlens: (rows, n) integers, each row beginning at 0. Returns (rows, num_tokens) int64.
    """
    bounds = cu_seqlens.to(torch.int64).contiguous()
    tokens = torch.arange(num_tokens, device=bounds.device)
    tokens = tokens.expand(bounds.shape[0], num_tokens).contiguous()
    document = torch.searchsorted(bounds, tokens, right=True) - 1
    return bounds.gather(1, document)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    def refuse(expected: str) -> IlmCompileError:
        shapes = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}"
        shapes += f", v {tuple(v.shape)} {v.dtype}"
        if cu_seqlens is not None:
            shapes += f", cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        return IlmCompileError(f"ilm::attention: expected {expected}; got {shapes}")

    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise refuse("q (batch, seq, heads, head_dim) and k, v (batch, seq, kv_heads, head_dim)")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise refuse("q, k and v to agree in batch, seq and head_dim")
    if q.shape[2] % k.shape[2] != 0:
        raise refuse("the heads of q to be a multiple of the heads of k")
    if not q.dtype == k.dtype == v.dtype:
        raise refuse("q, k and v of one dtype")
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise refuse("cu_seqlens of int32 or int64")
    if cu_seqlens.dim() not in (1, 2) or (cu_seqlens.dim() == 2 and len(cu_seqlens) != len(q)):
        raise refuse("cu_seqlens (batch, n), or (n,) over the flattened tokens")


def _fold(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Batch rows laid end to end when the boundaries run over all B*S tokens: (1, B*S, ...)."""
    flattened = cu_seqlens is not None and cu_seqlens.dim() == 1
    return x.reshape(1, -1, *x.shape[2:]) if flattened else x


def _may_read(num_tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """True where a query (last but one dim) may read a key (last dim): (rows or 1, 1, T, T)."""
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()
    if cu_seqlens is None:
        return causal[None, None]
    starts = document_starts(cu_seqlens.reshape(-1, cu_seqlens.shape[-1]), num_tokens)
    return causal & (starts[:, None, :, None] == starts[:, None, None, :])


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, scale: float | None = None
) -> Tensor:
    _check(q, k, v, cu_seqlens)
    q_fold, k_fold, v_fold = (_fold(x, cu_seqlens).transpose(1, 2) for x in (q, k, v))
    mask = None if cu_seqlens is None else _may_read(q_fold.shape[2], cu_seqlens, q.device)
    out = F.scaled_dot_product_attention(
        q_fold,
        k_fold,
        v_fold,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2).reshape(q.shape).contiguous()


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from probabilities that are computed again.

    With P = softmax(scale Q K'), O = P V and dP = dO V': dV = P' dO, dS = P * (dP - sum(dP * P)),
    dQ = scale dS K, dK = scale dS' Q (FlashAttention, arXiv:2205.14135, appendix B). Written out
    because torch.autograd is switched off inside an op that runs under a dispatch mode.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    exact = torch.promote_types(q.dtype, torch.float32)
    key, value = (_fold(x, cu_seqlens).to(exact).transpose(1, 2) for x in (k, v))
    rows, kv_heads, num_tokens, head_dim = key.shape
    # The R query heads that share a key head become R*T rows of one matrix: (rows, G, R*T, D).
    grouped = (rows, num_tokens, kv_heads, -1, head_dim)
    query, grad_out = (
        _fold(x, cu_seqlens).to(exact).reshape(grouped).permute(0, 2, 3, 1, 4).flatten(2, 3)
        for x in (q, grad)
    )
    query = query * scale

    hidden = ~_may_read(num_tokens, cu_seqlens, q.device).unsqueeze(2)
    scores = query @ key.mT
    scores.view(rows, kv_heads, -1, num_tokens, num_tokens).masked_fill_(hidden, float("-inf"))
    probabilities = scores.softmax(-1)

    # In place from here: these (T, T) matrices are nearly all of the time and the memory.
    grad_scores = grad_out @ value.mT
    grad_scores -= (grad_scores * probabilities).sum(-1, keepdim=True)
    grad_scores *= probabilities

    grad_query = (grad_scores @ key * scale).view(rows, kv_heads, -1, num_tokens, head_dim)
    grad_query = grad_query.permute(0, 3, 1, 2, 4)
    grad_key = (grad_scores.mT @ query).transpose(1, 2)
    grad_value = (probabilities.mT @ grad_out).transpose(1, 2)
    return (
        grad_query.reshape(q.shape).to(q.dtype).contiguous(),
        grad_key.reshape(k.shape).to(k.dtype).contiguous(),
        grad_value.reshape(v.shape).to(v.dtype).contiguous(),
    )


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None, scale: float | None = None
) -> Tensor:
    _check(q, k, v, cu_seqlens)
    return q.new_empty(q.shape)


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, scale = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)
    ctx.scale = scale


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    q, k, v, cu_seqlens = ctx.saved_tensors
    grads = torch.ops.ilm.attention_backward(grad, q, k, v, cu_seqlens, ctx.scale)
    grad_q, grad_k, grad_v = grads
    return grad_q, grad_k, grad_v, None, None


torch.library.impl("ilm::attention", ("cpu", "cuda"), _forward)
torch.library.impl("ilm::attention_backward", ("cpu", "cuda"), _backward)
torch.library.register_fake("ilm::attention", _forward_fake)
torch.library.register_fake("ilm::attention_backward", _backward_fake)
torch.library.register_autograd("ilm::attention", _differentiate, setup_context=_save_inputs)

"""The op `ilm::attention`: causal attention that never looks across a document boundary.

One graph node whatever computes it. This file holds the schema, the shape contract and who computes
it: on the CPU the reference of attention_reference.py, whose backward is an op of its own, so that
a joint graph shows both; on CUDA a backend of attention_backends.py, which autograd and selective
checkpointing see through: to them it is the backend's ops, as F.scaled_dot_product_attention is.

Shapes in this file: B batch, S tokens per row, H query heads, G key and value heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels import attention_backends, attention_reference
from ilm_compile.kernels.documents import document_starts as document_starts
from ilm_compile.kernels.documents import is_flat, runs_of
from ilm_compile.kernels.library import as_written, differentiable

torch.library.define(
    "ilm::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens=None, float? scale=None,"
    " int[]? tokens=None) -> Tensor",
)
torch.library.define(
    "ilm::attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float? scale,"
    " int[]? tokens) -> (Tensor, Tensor, Tensor)",
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    tokens: list[int] | None = None,
) -> Tensor:
    """Causal attention of every query over the keys before it in the same document.

    q: (B, S, H, D); k, v: (B, S, G, D), H a multiple of G: query head j reads key head
    j // (H // G). cu_seqlens: None (each row is one document), or integers, either (B, n): where
    the documents of each row start, beginning at 0 and padded with S, or (n,): the same over the
    flattened B*S tokens, padded with B*S; or what `ilm::document_boundaries` makes of it for these
    `tokens`, once for several calls. scale: multiplies the scores, 1/sqrt(D) when None.
    tokens: where q holds some of the S queries only, start and stop of each run of them, in the
    order in which they lie in q. Returns the shape and the dtype of q.
    """
    result: Tensor = torch.ops.ilm.attention(q, k, v, cu_seqlens, scale, tokens)
    return result


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, tokens: list[int] | None
) -> None:
    def refuse(expected: str) -> IlmCompileError:
        shapes = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}"
        shapes += f", v {tuple(v.shape)} {v.dtype}"
        if cu_seqlens is not None:
            shapes += f", cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        return IlmCompileError(f"ilm::attention: expected {expected}; got {shapes}")

    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise refuse("q (batch, seq, heads, head_dim) and k, v (batch, seq, kv_heads, head_dim)")
    dims = 2 if tokens is None else 1
    if q.shape[:dims] != k.shape[:dims] or q.shape[3] != k.shape[3]:
        raise refuse(f"q, k and v to agree in batch, {'seq ' if dims > 1 else ''}and head_dim")
    runs = runs_of(tokens, k.shape[1])
    if q.shape[1] != sum(stop - start for start, stop in runs):
        raise refuse(f"the queries of the tokens {runs} of {k.shape[1]}")
    if q.shape[2] % k.shape[2] != 0:
        raise refuse("the heads of q to be a multiple of the heads of k")
    if not q.dtype == k.dtype == v.dtype:
        raise refuse("q, k and v of one dtype")
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise refuse("cu_seqlens of int32 or int64")
    if cu_seqlens.dim() == 4:
        made, batch = tuple(cu_seqlens.shape[:3]), k.shape[0]
        number = len(runs) * batch if tokens is not None and is_flat(cu_seqlens) else len(runs)
        if made not in {(number, 1 if tokens is None else 2, rows) for rows in (1, batch)}:
            raise refuse(f"the boundaries of documents for the queries of {runs}")
    elif cu_seqlens.dim() not in (1, 2) or (cu_seqlens.dim() == 2 and len(cu_seqlens) != len(q)):
        raise refuse("cu_seqlens (batch, n), or (n,) over the flattened tokens")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    tokens: list[int] | None = None,
) -> Tensor:
    _check(q, k, v, cu_seqlens, tokens)
    return attention_reference.forward(q, k, v, cu_seqlens, scale, tokens)


def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    tokens: list[int] | None = None,
) -> Tensor:
    _check(q, k, v, cu_seqlens, tokens)
    return attention_backends.attention(q, k, v, cu_seqlens, scale, tokens)


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    tokens: list[int] | None = None,
) -> Tensor:
    _check(q, k, v, cu_seqlens, tokens)
    return q.new_empty(q.shape)


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    tokens: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
    q, k, v, cu_seqlens = ctx.saved_tensors
    grads = torch.ops.ilm.attention_backward(grad, q, k, v, cu_seqlens, *ctx.options)
    grad_q, grad_k, grad_v = grads
    return grad_q, grad_k, grad_v, None, None, None


torch.library.impl("ilm::attention", "cpu", as_written(_forward))
torch.library.impl("ilm::attention", "cuda", _cuda)
torch.library.impl(
    "ilm::attention_backward", ("cpu", "cuda"), as_written(attention_reference.backward)
)
torch.library.register_fake("ilm::attention", _forward_fake)
torch.library.register_fake("ilm::attention_backward", _backward_fake)
differentiable("ilm::attention", _save_inputs, _differentiate)

# On CUDA autograd differentiates the backend, which keeps what its backward needs, in place of the
# rule above. Kept in a name: an implementation lives as long as the library that it came by.
_CUDA_AUTOGRAD = torch.library.Library("ilm", "FRAGMENT")  # type: ignore[no-untyped-call]
_CUDA_AUTOGRAD.impl("attention", _cuda, "AutogradCUDA")  # type: ignore[no-untyped-call]

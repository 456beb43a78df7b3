"""Attention whose keys and values travel from rank to rank while those that came are worked on.

Each rank holds the queries, keys and values of its tokens and attends to one rank's keys after
another (Ring Attention, arXiv:2310.01889). No rank ever holds more than two ranks' keys and values.
In backward they travel again, and their gradients with them, each rank adding its part, until they
are home. Of causal attention what all queries would mask is left out; head and tail pieces on each
rank then leave every rank the same work at every step.

Shapes in this file: q (B, H, N, D), k (B, G, N, D), v (B, G, N, E), N the tokens of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ilm_compile.kernels import attention_blocks as blocks
from ilm_compile.kernels.documents import documents
from ilm_compile.kernels.library import as_written, differentiable, exact_dtype
from ilm_compile.program.communicator import Communicator, communicator, communicators
from ilm_compile.program.placement import Placement

torch.library.define(
    "ilm::ring_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? cu_seqlens, float scale, bool is_causal,"
    " int rows, str placement, str axis) -> (Tensor, Tensor)",
)
torch.library.define(
    "ilm::ring_attention_backward",
    "(bool is_learned, Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor? mask, Tensor? cu_seqlens, float scale, bool is_causal, int rows, str placement,"
    " str axis) -> (Tensor, Tensor, Tensor, Tensor)",
)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    is_causal: bool,
    rows: int,
    placement: str,
    axis: str,
) -> Tensor:
    """Return the attention of this rank's queries over the keys of all ranks of `axis`.

    mask: of this rank's queries and all keys, or None. cu_seqlens: or boundaries, best on the host,
    which reads them: see `kernels.documents`. rows: that lie end to end in N. placement: how each
    row's tokens are cut.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = mask, cu_seqlens, scale, is_causal, rows, placement, axis
    result: Tensor = torch.ops.ilm.ring_attention(q, k, v, *options)[0]
    return result


class _Piece(NamedTuple):
    """Some of a rank's queries and some of the keys that came; `tokens`: where these stand."""

    rows: slice
    asked: slice
    seen: slice
    tokens: slice
    is_diagonal: bool

    @property
    def queries(self) -> tuple[slice, slice, slice]:
        return self.rows, slice(None), self.asked

    @property
    def keys(self) -> tuple[slice, slice, slice]:
        return self.rows, slice(None), self.seen


Run: TypeAlias = tuple[int, int, int]  # tokens from, to, and where a rank has the first of them


def _runs(placement: str, num_tokens: int, rows: int, comm: Communicator) -> list[list[Run]]:
    """Return what each rank holds of `rows` rows that lie end to end, `num_tokens` in all."""
    length = num_tokens // rows
    found: list[list[Run]] = []
    for rank in range(comm.size):
        held, here = [], 0
        for row in range(0, num_tokens, length):
            for start, stop in Placement.parse(placement).held(length, comm.size, rank):
                held.append((row + start, row + stop, here))
                here += stop - start
        found.append(held)
    return found


def _pieces(
    asked: list[Run], seen: list[Run], is_causal: bool, whole: list[tuple[slice, slice]]
) -> Iterator[_Piece]:
    """Yield what to compute. Runs are apart or the same; `whole`: rows and tokens of documents."""
    if not is_causal:
        for start, stop, at in seen:
            held = slice(at, at + stop - start)
            yield _Piece(slice(None), slice(None), held, slice(start, stop), False)
        return
    for rows, document in whole:
        queries, keys = ([*_within(runs, document)] for runs in (asked, seen))
        for first, last, at in keys:
            for start, stop, here in queries:
                if first <= start:
                    mine, held = slice(here, here + stop - start), slice(at, at + last - first)
                    yield _Piece(rows, mine, held, slice(first, last), first == start)


def _within(runs: list[Run], document: slice) -> Iterator[Run]:
    for first, last, at in runs:
        start, stop = max(first, document.start), min(last, document.stop)
        if start < stop:
            yield start, stop, at + start - first


class _Ring:
    """What forward and backward share: who else there is, and who holds which tokens."""

    def __init__(
        self,
        k: Tensor,
        cu_seqlens: Tensor | None,
        is_causal: bool,
        rows: int,
        placement: str,
        axis: str,
    ) -> None:
        self.comm = communicator(axis)
        num_tokens = k.shape[2] * self.comm.size  # another axis may cut the queries alone
        self.runs = _runs(placement, num_tokens, rows, self.comm)
        self.is_causal = is_causal
        self.documents = list(documents(len(k), num_tokens, cu_seqlens))

    def travel(self, *xs: Tensor) -> Iterator[tuple[list[_Piece], list[Tensor]]]:
        """Yield each rank's `xs`, this one's first, with what to do; the next are under way."""
        here, came = self.comm.rank, list(xs)
        for step in range(self.comm.size):
            is_last = step + 1 == self.comm.size
            wait = None if is_last else self.comm.shift(came)
            owner = self.runs[(here - step) % self.comm.size]
            yield [*_pieces(self.runs[here], owner, self.is_causal, self.documents)], came
            came = wait() if wait else []


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    is_causal: bool,
    rows: int,
    placement: str,
    axis: str,
) -> tuple[Tensor, Tensor]:
    exact = exact_dtype(q)
    out = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=exact, device=q.device)
    lse = torch.full(q.shape[:-1], float("-inf"), dtype=exact, device=q.device)
    for pieces, (key, value) in _Ring(k, cu_seqlens, is_causal, rows, placement, axis).travel(k, v):
        for piece in pieces:
            mine, theirs = piece.queries, piece.keys
            part = None if mask is None else mask[..., piece.tokens]
            block = q[mine], key[theirs], value[theirs], part, scale, piece.is_diagonal
            blocks.merge(out[mine], lse[mine], *blocks.forward(*block))
    return out.to(q.dtype), blocks.seen(lse)


def _backward(
    is_learned: bool,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    is_causal: bool,
    rows: int,
    placement: str,
    axis: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, and of the mask where it `is_learned`."""
    ring, exact = _Ring(k, cu_seqlens, is_causal, rows, placement, axis), exact_dtype(q)
    grad_mask = q.new_empty(0)
    if mask is not None and is_learned:
        grad_mask = mask.new_zeros(mask.shape)
    grad_q = torch.zeros_like(q, dtype=exact)
    carried = None
    for pieces, (key, value) in ring.travel(k, v):
        grads = [torch.zeros_like(x, dtype=exact) for x in (key, value)]
        for piece in pieces:
            mine, theirs = piece.queries, piece.keys
            part = None if mask is None else mask[..., piece.tokens]
            of_mask = grad_mask[..., piece.tokens] if is_learned else None
            operands = grad[mine], q[mine], key[theirs], value[theirs], out[mine]
            options = lse[mine].contiguous(), part, scale, piece.is_diagonal, of_mask
            found = blocks.backward(*operands, *options)
            grad_q[mine] += found[0]
            for total, more in zip(grads, found[1:], strict=True):
                total[theirs] += more
        if carried is not None:
            grads = [more + before for more, before in zip(grads, carried(), strict=True)]
        carried = ring.comm.shift([x.to(k.dtype) for x in grads])
    assert carried is not None
    grad_k, grad_v = carried()
    return grad_q.to(q.dtype), grad_k, grad_v, grad_mask


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = q.shape[:-1]
    return q.new_empty((*shape, v.shape[-1])), q.new_empty(shape, dtype=exact_dtype(q))


def _backward_fake(is_learned: bool, grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    q, k, v, _, _, mask, *_ = inputs
    return *(x.new_empty(x.shape) for x in (q, k, v)), q.new_empty(mask.shape if is_learned else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, mask, cu_seqlens)
    ctx.set_materialize_grads(False)
    ctx.comm = communicator(ctx.options[-1])


def _differentiate(ctx: Any, grad: Tensor, grad_lse: None) -> tuple[Tensor | None, ...]:
    is_learned = ctx.needs_input_grad[3]
    with communicators(**{ctx.options[-1]: ctx.comm}):  # autograd may be in another thread
        run = torch.ops.ilm.ring_attention_backward
        *found, of_mask = run(is_learned, grad, *ctx.saved_tensors, *ctx.options)
    return *found, of_mask if is_learned else None, *(None,) * (1 + len(ctx.options))


for _name, _run, _fake in (
    ("ilm::ring_attention", _forward, _forward_fake),
    ("ilm::ring_attention_backward", _backward, _backward_fake),
):
    torch.library.impl(_name, ("cpu", "cuda"), as_written(_run))
    torch.library.register_fake(_name, _fake)
differentiable("ilm::ring_attention", _save, _differentiate)

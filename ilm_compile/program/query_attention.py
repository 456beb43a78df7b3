"""Attention whose queries are sharded by position: what a rank runs for its share of them.

Keys and values are whole on every rank, or cut into as many parts as there are ranks, which then
travel round them. Which queries a rank holds is read at run time, as the offset of a vocabulary is,
so that all ranks share one graph; the placement says how they are cut, and keys that travel are cut
alike. Over whole keys attention is causal, each run of queries reading the keys up to its end.

The last arguments of both ops are the placement of the queries, the parts of the keys and the axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ilm_compile.kernels.documents import fold, is_flat
from ilm_compile.kernels.last_queries import attend_last_keeping_inputs
from ilm_compile.program.communicator import communicator
from ilm_compile.program.placement import Placement
from ilm_compile.program.ring_attention import ring_attention

torch.library.define(
    "ilm::query_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float? scale, str placement, int parts,"
    " str axis) -> Tensor",
)
torch.library.define(
    "ilm::query_dot_product_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, bool is_causal, float? scale,"
    " bool enable_gqa, str placement, int parts, str axis) -> Tensor",
)
torch.library.define(
    "ilm::query_boundaries",
    "(Tensor cu_seqlens, int batch, int num_tokens, str placement, str axis) -> Tensor",
)

FORMS = (
    torch.ops.ilm.query_dot_product_attention.default,
    torch.ops.ilm.query_attention.default,
)


def parts_of(node: fx.Node) -> int:
    """Return into how many parts, which travel, the keys of a call are cut; 1: they are whole."""
    return int(node.args[-2]) if node.target in FORMS else 1  # type: ignore[arg-type]


def has_mask(node: fx.Node) -> bool:
    """Whether a call of one of the forms has a mask."""
    return node.target is FORMS[0] and node.args[3] is not None


def slowest_share(placement: Placement, num_tokens: int, size: int) -> float:
    """Return the work of the rank that has most of it, against the mean.

    The work is the pairs of a query and a key that it sees.
    """
    pairs = [
        sum(stop * (stop + 1) - start * (start + 1) for start, stop in runs)
        for runs in (placement.held(num_tokens, size, rank) for rank in range(size))
    ]
    return max(pairs) * size / sum(pairs)


def _runs(placement: str, axis: str, num_tokens: int) -> list[tuple[int, int]]:
    """The tokens of this rank's queries: start and stop of each run."""
    here = communicator(axis)
    return Placement.parse(placement).held(num_tokens, here.size, here.rank)


def _query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    placement: str,
    parts: int,
    axis: str,
) -> Tensor:
    """`ilm::attention` of q (B, S / size, H, D) over k and v (B, S / parts, G, D).

    cu_seqlens: or boundaries, `ilm::query_boundaries`' over whole keys, where keys travel those of
    all queries (`ilm::document_boundaries`).
    """
    if parts > 1:
        rows = len(q) if is_flat(cu_seqlens) else 1
        query, key, value = (fold(x, cu_seqlens).transpose(1, 2) for x in (q, k, v))
        options = None, cu_seqlens, scale, True, rows, placement, axis
        out = ring_attention(query, key, value, *options)
        return out.transpose(1, 2).reshape(q.shape).contiguous()
    tokens = _tokens(placement, axis, k.shape[1])
    result: Tensor = torch.ops.ilm.attention(q, k, v, cu_seqlens, scale, tokens)
    return result


def _query_boundaries(
    cu_seqlens: Tensor, batch: int, num_tokens: int, placement: str, axis: str
) -> Tensor:
    """`ilm::document_boundaries` for the queries of this rank."""
    tokens = _tokens(placement, axis, num_tokens)
    result: Tensor = torch.ops.ilm.document_boundaries(cu_seqlens, batch, num_tokens, tokens)
    return result


def _tokens(placement: str, axis: str, num_tokens: int) -> list[int]:
    return [bound for run in _runs(placement, axis, num_tokens) for bound in run]


def _query_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    placement: str,
    parts: int,
    axis: str,
) -> Tensor:
    """`scaled_dot_product_attention` of q (..., S / size, D) over keys (..., S / parts, D)."""
    if parts > 1:
        mask = attn_mask
        if mask is not None:
            mask = mask.expand(*mask.shape[:-1], k.shape[-2] * parts)
        return ring_attention(q, k, v, mask, None, scale, is_causal, 1, placement, axis)
    assert is_causal, "over whole keys other attention needs no form of its own"
    found, first = [], 0
    for start, stop in _runs(placement, axis, k.shape[-2]):
        queries = q.narrow(-2, first, stop - start)
        seen = (x.narrow(-2, 0, stop) for x in (k, v))
        found.append(attend_last_keeping_inputs(queries, *seen, scale=scale, enable_gqa=enable_gqa))
        first += stop - start
    return found[0] if len(found) == 1 else torch.cat(found, -2)


# In terms of ops that autograd knows: a rank is asked for in the forward pass alone.
_KIND = "CompositeImplicitAutograd"
torch.library.impl("ilm::query_attention", _KIND, _query_attention)
torch.library.impl("ilm::query_boundaries", _KIND, _query_boundaries)
torch.library.impl("ilm::query_dot_product_attention", _KIND, _query_dot_product_attention)

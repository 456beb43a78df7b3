"""Causal attention whose queries are sharded by position: what a rank runs for its share of them.

Keys and values are whole on every rank. Which queries a rank holds is read at run time, as the
offset of a vocabulary is, so that all ranks share one graph; the placement says how they are cut.
Each run of queries reads the keys up to its end and no further.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilm_compile.kernels.last_queries import attend_last_keeping_inputs
from ilm_compile.program.communicator import communicator
from ilm_compile.program.placement import Placement

torch.library.define(
    "ilm::query_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, float? scale, str placement, str axis)"
    " -> Tensor",
)
torch.library.define(
    "ilm::query_dot_product_attention",
    "(Tensor q, Tensor k, Tensor v, float? scale, bool enable_gqa, str placement, str axis)"
    " -> Tensor",
)


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
    axis: str,
) -> Tensor:
    """`ilm::attention` of q (B, S / size, H, D) over k and v (B, S, G, D)."""
    runs = _runs(placement, axis, k.shape[1])
    bounds = [bound for run in runs for bound in run]
    result: Tensor = torch.ops.ilm.attention(q, k, v, cu_seqlens, scale, bounds)
    return result


def _query_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    enable_gqa: bool,
    placement: str,
    axis: str,
) -> Tensor:
    """`scaled_dot_product_attention` with is_causal of q (..., S / size, D), keys (..., S, D)."""
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
torch.library.impl("ilm::query_dot_product_attention", _KIND, _query_dot_product_attention)

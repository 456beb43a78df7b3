"""Attention: by heads, by batch, or by queries: over every key, or in a ring.

By queries causal attention depends on where a rank's queries stand: it becomes an op that reads
that from the axis (`ilm_compile.program.query_attention`). A mask that is a tensor is cut with the
queries, and then the op stays as it is. In a ring the keys are cut as the queries are, and travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import fx

from ilm_compile.kernels.attention import attention as _attention  # noqa: F401 - registers the op
from ilm_compile.ops.call import Call, LocalCall, Strategy, aten, unchanged
from ilm_compile.ops.nodes import shape_of
from ilm_compile.ops.pointwise import aligned
from ilm_compile.ops.precision import PRODUCT
from ilm_compile.ops.spec import Flops, rule
from ilm_compile.program.arguments import argument
from ilm_compile.program.placement import I, Placement, R, S
from ilm_compile.program.query_attention import FORMS, parts_of, slowest_share

ilm = torch.ops.ilm
SDPA, ATTENTION = aten.scaled_dot_product_attention.default, ilm.attention.default
QUERY_SDPA, QUERY_ATTENTION = FORMS
BOUNDARIES, QUERY_BOUNDARIES = ilm.document_boundaries.default, ilm.query_boundaries.default

# The dimension of the query and of the key that counts heads, and the one that counts tokens.
HEAD_DIM: dict[Any, int] = {ATTENTION: 2, SDPA: -3}
TOKEN_DIM: dict[Any, int] = {ATTENTION: 1, SDPA: -2}
_QUERY_DIM: dict[Any, int] = {QUERY_ATTENTION: 1, QUERY_SDPA: -2}


def _local(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    how, causal = way(call, strategy), is_causal(call)
    if how == "heads" or (how == "queries" and not causal):
        return unchanged(call)
    cut = str(strategy.output), call.size if how == "ring" else 1, axis
    scale = call.named("scale")
    if call.target is ATTENTION:
        return QUERY_ATTENTION, (*call.args[:3], call.named("cu_seqlens"), scale, *cut), {}
    mask, grouped = call.named("attn_mask"), bool(call.named("enable_gqa"))
    return QUERY_SDPA, (*call.args[:3], mask, causal, scale, grouped, *cut), {}


def _products(num_heads: int, queries: int, keys: int, dims: int, causal: bool) -> int:
    """FLOPs of scores and weighted values of all heads; `dims` of a query and of a value."""
    full = 2 * num_heads * queries * keys * dims
    return full // 2 if causal else full


def _ilm_attention(node: fx.Node) -> int:
    (batch, queries, heads, dim), dims = shape_of(node.args[0]), shape_of(node.args[2])
    return _products(batch * heads, queries, _keys(node), dim + dims[3], causal=True)


def _sdpa(node: fx.Node) -> int:
    (*batch, queries, dim), k, v = (shape_of(argument) for argument in node.args[:3])
    causal = bool(argument(node, "is_causal"))
    return _products(prod(batch), queries, k[-2], dim + v[-1], causal=causal)


def _queries(node: fx.Node) -> int:
    """For a share of the queries: the mean over the ranks (see `_slowest`)."""
    (*batch, queries, dim), dims = shape_of(node.args[0]), shape_of(node.args[2])
    causal = bool(node.args[4])
    return _products(prod(batch), queries, _keys(node), dim + dims[-1], causal=causal)


def _keys(node: fx.Node) -> int:
    """The keys of a causal attention, those included that are on other ranks."""
    return shape_of(node.args[1])[_QUERY_DIM.get(node.target, 1)] * parts_of(node)


def _slowest(node: fx.Node) -> float:
    if node.args[4] is False:  # not causal
        return 1.0
    queries, keys = shape_of(node.args[0])[_QUERY_DIM[node.target]], _keys(node)
    return slowest_share(Placement.parse(str(node.args[-3])), keys, keys // queries)


def _flops(
    forward: Callable[[fx.Node], int], slowest: Callable[[fx.Node], float] = lambda node: 1.0
) -> Flops:
    return Flops(forward, lambda node: node.args[:3], slowest)


@rule(ATTENTION, local=_local, flops=_flops(_ilm_attention), precision=PRODUCT)
def attention(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """q, k, v: (batch, seq, heads, head_dim), sharded by heads, by batch or by queries."""
    boundaries = call.shapes[3:]
    yield Strategy((S(2), S(2), S(2), *(R for _ in boundaries)), S(2))
    if all(len(shape) == 2 for shape in boundaries):
        yield Strategy((S(0), S(0), S(0), *(S(0) for _ in boundaries)), S(0))
    if call.named("tokens") is not None or any(len(shape) == 4 for shape in boundaries):
        return  # boundaries that were made are those of certain queries
    for out in wanted:
        if out.is_shard and out.dim == 1:
            yield Strategy((out, *(R for _ in call.shapes[1:])), out)
            yield Strategy((out, out, out, *(R for _ in boundaries)), out)


@rule(SDPA, local=_local, flops=_flops(_sdpa), precision=PRODUCT, probability=(4, "dropout_p"))
def scaled_dot_product_attention(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """q, k, v: (..., heads, seq, head_dim), sharded by any dimension before seq, or by queries.

    Attention dropout draws random numbers per rank, so with it nothing is sharded.
    """
    if call.argument(4, "dropout_p", 0.0):
        return
    last = len(call.shape) - 2
    for dim in range(last):
        masks = [aligned(shape, call.shape, S(dim)) for shape in call.shapes[3:]]
        yield Strategy((S(dim), S(dim), S(dim), *masks), S(dim))
    if is_causal(call) and call.shapes[0][last] != call.shapes[1][last]:
        return
    for out in wanted:
        if out.is_shard and out.dim == last:
            masks = [aligned(shape, call.shape, out) for shape in call.shapes[3:]]
            yield Strategy((out, R, R, *masks), out)
            if len(call.shape) == 4 and call.shapes[0][last] == call.shapes[1][last]:
                yield Strategy((out, out, out, *masks), out)


@rule(
    QUERY_ATTENTION,
    stands_for=lambda args: (ATTENTION, args[:5]),
    flops=_flops(_ilm_attention, _slowest),
    precision=PRODUCT,
)
@rule(
    QUERY_SDPA,
    stands_for=lambda args: (SDPA, (*args[:4], 0.0, args[4])),
    flops=_flops(_queries, _slowest),
    precision=PRODUCT,
)
def by_queries(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The queries are sharded by construction, and keys that travel; a mask as the queries."""
    placement, parts = Placement.parse(call.args[-3]), call.args[-2]
    keys = placement if parts > 1 else R
    masks = call.shapes[3:]
    if call.target is QUERY_SDPA:
        rest = [aligned(shape, call.shape, placement) for shape in masks]
    else:
        rest = [S(0) if len(shape) == 4 and parts == 1 else R for shape in masks]
    yield Strategy((placement, keys, keys, *rest), placement)


@rule(
    QUERY_BOUNDARIES,
    stands_for=lambda args: (BOUNDARIES, args[:3]),
    other_axis=lambda call, wanted: iter(()),
)
def query_boundaries(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Each rank has those of its own runs of queries, on the axis that cuts them."""
    yield from (Strategy((whole,), S(0)) for whole in (I, R))


def is_causal(call: Call) -> bool:
    """Whether an attention gives queries no later keys, by itself and not by a mask."""
    return call.target is ATTENTION or bool(call.argument(5, "is_causal", False))


def is_by_queries(call: Call, strategy: Strategy) -> bool:
    """Whether a strategy of an attention shards its queries by position."""
    placement = strategy.inputs[0]
    return placement.is_shard and placement.dim == TOKEN_DIM[call.target] % len(call.shape)


def way(call: Call, strategy: Strategy) -> str:
    """Return how an attention is divided, as `cp_attention` names it; "heads" for any other way."""
    if not is_by_queries(call, strategy):
        return "heads"
    return "ring" if strategy.inputs[1].is_shard else "queries"


def slowest(call: Call, strategy: Strategy) -> float:
    """Return the work of the rank that has most of it, against the mean.

    Of queries sharded by position the last ones see the most keys.
    """
    if call.target not in TOKEN_DIM or not is_causal(call) or not is_by_queries(call, strategy):
        return 1.0
    length = call.shapes[0][TOKEN_DIM[call.target]]
    return slowest_share(strategy.inputs[0], length, call.size)


def has_mask(call: Call) -> bool:
    """Whether an attention has a mask that is a tensor."""
    return call.target is SDPA and len(call.shapes) > 3

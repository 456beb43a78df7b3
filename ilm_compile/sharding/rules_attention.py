"""Rules of attention: by heads, by batch, or by queries with every key on every rank.

By queries causal attention depends on where a rank's queries stand: it becomes an op that reads
that from the axis (`ilm_compile.program.query_attention`). A mask that is a tensor is cut with the
queries, and then the op stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ilm_compile.kernels.attention import attention as _attention  # noqa: F401 - registers the op
from ilm_compile.program.placement import Placement, R, S
from ilm_compile.program.query_attention import slowest_share  # registers the ops
from ilm_compile.sharding.rules_math import aligned
from ilm_compile.sharding.sharded_forms import LocalCall
from ilm_compile.sharding.strategy import Call, Strategy, aten, rule

ilm = torch.ops.ilm
SDPA, ATTENTION = aten.scaled_dot_product_attention.default, ilm.attention.default
QUERY_SDPA, QUERY_ATTENTION = (
    ilm.query_dot_product_attention.default,
    ilm.query_attention.default,
)
LOCAL_FORMS = (QUERY_SDPA, QUERY_ATTENTION)

# The dimension of the query and of the key that counts heads, and the one that counts tokens.
HEAD_DIM: dict[Any, int] = {ATTENTION: 2, SDPA: -3}
TOKEN_DIM: dict[Any, int] = {ATTENTION: 1, SDPA: -2}


@rule(ATTENTION)
def attention(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """q, k, v: (batch, seq, heads, head_dim), sharded by heads, by batch or by queries."""
    boundaries = call.shapes[3:]
    yield Strategy((S(2), S(2), S(2), *(R for _ in boundaries)), S(2))
    if all(len(shape) == 2 for shape in boundaries):
        yield Strategy((S(0), S(0), S(0), *(S(0) for _ in boundaries)), S(0))
    for out in wanted:
        if out.is_shard and out.dim == 1 and call.named("tokens") is None:
            yield Strategy((out, *(R for _ in call.shapes[1:])), out)


@rule(SDPA)
def scaled_dot_product_attention(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """q, k, v: (..., heads, seq, head_dim), sharded by any dimension before seq, or by queries.

    Attention dropout draws random numbers per rank, so with it nothing is sharded.
    """
    if call.argument(4, "dropout_p", 0.0):
        return
    last = len(call.shape) - 2
    for dim in range(last):
        masks = (aligned(shape, call.shape, S(dim)) for shape in call.shapes[3:])
        yield Strategy((S(dim), S(dim), S(dim), *masks), S(dim))
    if is_causal(call) and call.shapes[0][last] != call.shapes[1][last]:
        return
    for out in wanted:
        if out.is_shard and out.dim == last:
            masks = (aligned(shape, call.shape, out) for shape in call.shapes[3:])
            yield Strategy((out, R, R, *masks), out)


@rule(QUERY_ATTENTION, QUERY_SDPA)
def by_queries(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The queries are sharded by construction."""
    placement = Placement.parse(call.args[5])
    yield Strategy((placement, *(R for _ in call.shapes[1:])), placement)


def is_causal(call: Call) -> bool:
    """Whether an attention gives queries no later keys, by itself and not by a mask."""
    return call.target is ATTENTION or bool(call.argument(5, "is_causal", False))


def is_by_queries(call: Call, strategy: Strategy) -> bool:
    """Whether a strategy of an attention shards its queries by position."""
    placement = strategy.inputs[0]
    return placement.is_shard and placement.dim == TOKEN_DIM[call.target] % len(call.shape)


def slowest(call: Call, strategy: Strategy) -> float:
    """Return the work of the rank that has most of it, against the mean.

    Of queries sharded by position the last ones see the most keys.
    """
    if call.target not in TOKEN_DIM or not is_causal(call) or not is_by_queries(call, strategy):
        return 1.0
    length = call.shapes[0][TOKEN_DIM[call.target]]
    return slowest_share(strategy.inputs[0], length, call.size)


def _local(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not is_causal(call) or not is_by_queries(call, strategy):
        return call.target, call.args, call.kwargs
    scale, placement = call.named("scale"), str(strategy.output)
    if call.target is ATTENTION:
        cu_seqlens = call.named("cu_seqlens")
        return QUERY_ATTENTION, (*call.args[:3], cu_seqlens, scale, placement, axis), {}
    grouped = bool(call.named("enable_gqa"))
    return QUERY_SDPA, (*call.args[:3], scale, grouped, placement, axis), {}


LOCAL: dict[Any, Callable[[Call, Strategy, str], LocalCall]] = {ATTENTION: _local, SDPA: _local}

"""Ops that reduce over a sharded dimension themselves: their sharded forms and the rules of these.

The rule of an op says where its dimension may be sharded; `LOCAL` then swaps in the form in which
the ranks exchange one or two numbers per kept element, never the dimension. What that is on the
wire is in `ilm_compile.program.traffic`, beside the cross entropy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

from ilm_compile.ops.strategy import Call, Strategy, aten, rule
from ilm_compile.program.placement import I, P, Placement, R, S
from ilm_compile.program.sharded_reductions import (
    partial_loss,
    sharded_amax,
    sharded_amin,
    sharded_argmax,
    sharded_gather,
    sharded_log_softmax,
    sharded_logsumexp,
    sharded_nll_loss,
    sharded_softmax,
)

LocalCall = tuple[Any, tuple[Any, ...], dict[str, Any]]
MEAN = 1  # ATen's encoding of a loss's reduction

REDUCED = {  # the same on all ranks
    aten.logsumexp.default: sharded_logsumexp,
    aten.amax.default: sharded_amax,
    aten.amin.default: sharded_amin,
    aten.argmax.default: sharded_argmax,
}
SOFTMAXES = {  # sharded as their input
    aten.softmax.int: sharded_softmax,
    aten.log_softmax.int: sharded_log_softmax,
}
ELEMENTWISE_LOSSES = (
    *(aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default),
    *(aten.huber_loss.default, aten.kl_div.default),
)


def reduced_dims(call: Call) -> list[int]:
    """Return the dimensions that a reduction reduces, none of them negative."""
    rank, given = len(call.shapes[0]), call.named("dim")
    dims = range(rank) if given in (None, []) else [given] if isinstance(given, int) else given
    return sorted(dim % rank for dim in dims)


@rule(*REDUCED.values())
def reduced_by_ranks(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """One of the reduced dimensions is sharded by construction."""
    given = call.args[1]
    dims = [given] if isinstance(given, int) else given
    yield from (Strategy((S(dim % len(call.shapes[0])),), I) for dim in dims)


@rule(*SOFTMAXES.values())
def softmax_by_ranks(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The dimension that sums to one is sharded by construction."""
    dim = call.args[1] % len(call.shape)
    yield from (Strategy((out,), out) for out in wanted if out.is_shard and out.dim == dim)


@rule(sharded_gather)
def gather_by_ranks(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The indexed dimension is sharded by construction."""
    yield Strategy((S(call.args[1] % len(call.shapes[0])), R), P)


@rule(sharded_nll_loss)
def nll_loss_by_ranks(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The classes are sharded by construction."""
    yield Strategy((S(1), R), P)


@rule(partial_loss)
def loss_by_ranks(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Some dimension is sharded by construction."""
    for dim in range(len(call.shapes[0])):
        yield from (Strategy((cut, cut), P) for cut in (S(dim), S(dim, folded=True)))


# How many all-reduces of the kept numbers an op runs inside, forward and backward, where it reduces
# over the ranks. (The cross entropy's are not counted: nothing else is as cheap for a vocabulary.)
_EXCHANGES: dict[Any, tuple[int, int]] = {
    aten.logsumexp.default: (2, 0),
    aten.amax.default: (1, 1),
    aten.amin.default: (1, 1),
    aten.argmax.default: (3, 0),  # an index is twice as wide
    aten.softmax.int: (2, 1),
    aten.log_softmax.int: (2, 1),
}


def exchanged(call: Call, strategy: Strategy) -> tuple[int, int]:
    """Return how many numbers `call` reduces over the ranks under `strategy`: forward, backward."""
    if call.target not in _EXCHANGES or LOCAL[call.target](call, strategy, "")[0] is call.target:
        return 0, 0
    dims = reduced_dims(call)
    kept = prod(n for dim, n in enumerate(call.shapes[0]) if dim not in dims)
    forward, backward = _EXCHANGES[call.target]
    return kept * forward, kept * backward


def _unchanged(call: Call) -> LocalCall:
    return call.target, call.args, call.kwargs


def _reduced(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not strategy.inputs[0].is_shard or strategy.output != I:
        return _unchanged(call)
    dims = call.named("dim") if call.target is aten.argmax.default else reduced_dims(call)
    return REDUCED[call.target], (call.args[0], dims, bool(call.named("keepdim")), axis), {}


def _softmax(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    x, dim = call.args[:2]
    if not strategy.output.is_shard or strategy.output.dim != dim % len(call.shape):
        return _unchanged(call)
    return SOFTMAXES[call.target], (x, dim, call.named("dtype"), axis), {}


def _gather(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not strategy.inputs[0].is_shard or strategy.output != P:
        return _unchanged(call)
    return sharded_gather, (*call.args[:3], axis), {}


def _nll_loss(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not strategy.inputs[0].is_shard:
        return _unchanged(call)
    options = call.argument(3, "reduction", MEAN), call.argument(4, "ignore_index", -100)
    return sharded_nll_loss, (*call.args[:2], *options, axis), {}


def _elementwise_loss(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    is_mean = call.argument(2, "reduction", MEAN) == MEAN
    if not is_mean or not strategy.inputs[0].is_shard:
        return _unchanged(call)
    declared = call.target._schema.arguments[3:]
    options = {argument.name: call.named(argument.name) for argument in declared}
    name = call.target._schema.name.removeprefix("aten::")
    return partial_loss, (name, *call.args[:2], axis), options


LOCAL: dict[Any, Callable[[Call, Strategy, str], LocalCall]] = {
    **dict.fromkeys(REDUCED, _reduced),
    **dict.fromkeys(SOFTMAXES, _softmax),
    **dict.fromkeys(ELEMENTWISE_LOSSES, _elementwise_loss),
    aten.gather.default: _gather,
    aten.nll_loss_nd.default: _nll_loss,
}

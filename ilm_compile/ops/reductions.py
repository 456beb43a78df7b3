"""Reductions, and ops that mix values along some dimensions, with their forms for sharded ones.

The rule of an op says where its dimension may be sharded; its local form is then one in which the
ranks exchange one or two numbers per kept element, never the dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from ilm_compile.ops.batch_constants import Values
from ilm_compile.ops.call import Call, Found, LocalCall, Strategy, aten, unchanged
from ilm_compile.ops.nodes import rewrites_input
from ilm_compile.ops.pointwise import aligned
from ilm_compile.ops.precision import NORM, REDUCTION, SOFTMAX
from ilm_compile.ops.spec import OpSpec, define, form, rule, spec_of
from ilm_compile.ops.strategy import localize
from ilm_compile.program.placement import I, P, Placement, R, S
from ilm_compile.program.reductions import partial_mean
from ilm_compile.program.sharded_reductions import (
    sharded_amax,
    sharded_amin,
    sharded_argmax,
    sharded_log_softmax,
    sharded_logsumexp,
    sharded_softmax,
)

SUMS = (aten.sum.default, aten.sum.dim_IntList)
MEANS = (aten.mean.default, aten.mean.dim)
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


def reduced_dims(call: Call) -> list[int]:
    """Return the dimensions that a reduction reduces, none of them negative."""
    rank, given = len(call.shapes[0]), call.named("dim")
    dims = range(rank) if given in (None, []) else [given] if isinstance(given, int) else given
    return sorted(dim % rank for dim in dims)


def _along(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    shape, over = call.shapes[0], call.named("dim")
    if over is None:
        return
    over %= len(shape)
    kept = len(shape) == len(call.shape)
    for dim in (d for d in range(len(shape)) if d != over):
        yield (S(dim),) * len(call.shapes), S(dim if kept else dim - (dim > over)), 0


def _pairing(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Cosines and distances of vectors along one dimension, the last if none is named."""
    over = (call.named("dim") if call.named("dim") is not None else -1) % len(call.shapes[0])
    keeps = bool(call.named("keepdim"))
    for dim in (d for d in range(len(call.shapes[0])) if d != over):
        inputs = tuple(aligned(s, call.shapes[0], S(dim)) for s in call.shapes)
        yield inputs, S(dim if keeps else dim - (dim > over)), 0


def _padded(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """The widths are given for the last dimensions first, two for each."""
    widths, rank = call.args[1], len(call.shape)
    padded = {rank - 1 - i // 2 for i, width in enumerate(widths) if width}
    yield from (((S(dim),), S(dim), 0) for dim in range(rank) if dim not in padded)


def _mean(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not strategy.inputs[0].is_shard or strategy.output != P:
        return unchanged(call)
    dims = call.named("dim") or list(range(len(call.shapes[0])))
    return partial_mean, (call.args[0], dims, bool(call.named("keepdim")), axis), {}


def _reduced(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not strategy.inputs[0].is_shard or strategy.output != I:
        return unchanged(call)
    dims = call.named("dim") if call.target is aten.argmax.default else reduced_dims(call)
    return REDUCED[call.target], (call.args[0], dims, bool(call.named("keepdim")), axis), {}


def _softmax(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    x, dim = call.args[:2]
    if not strategy.output.is_shard or strategy.output.dim != dim % len(call.shape):
        return unchanged(call)
    return SOFTMAXES[call.target], (x, dim, call.named("dtype"), axis), {}


def _summed(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Running sums, over classes or experts, of what each slice counted."""
    yield (P,), P, 0


def _batch_norm(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Each row alone, unless it takes means of the batch."""
    if not call.named("training"):
        rest = (R,) * (len(call.shapes) - 1)
        yield from (((S(d), *rest), S(d), 0) for d in range(len(call.shape)) if d != 1)


@rule(
    *SOFTMAXES,
    local=_softmax,
    exchanges=(2, 1),
    reaches=lambda call: [call.args[1]],
    precision=SOFTMAX,
)
@rule(
    aten.cumsum.default,
    reaches=lambda call: [call.args[1]],
    batch_rule=_summed,
    scales="linear",
)
@rule(aten.cumprod.default, reaches=lambda call: [call.args[1]])
@rule(aten.argsort.default, reaches=lambda call: [call.argument(1, "dim", -1)], batch_rule=_along)
@rule(
    *(aten.rms_norm.default, aten.layer_norm.default),
    reaches=lambda call: range(-len(call.args[1]), 0),
    precision=NORM,
)
@rule(aten.tril.default, aten.triu.default, reaches=lambda call: (-2, -1))
@rule(aten.flip.default, reaches=lambda call: call.args[1])
@rule(
    aten.roll.default,
    reaches=lambda call: call.argument(2, "dims") or range(len(call.shape)),
)
@rule(
    *(aten.pad.default, aten.constant_pad_nd.default),
    reaches=lambda call: range(-len(call.args[1]) // 2, 0),
    batch_rule=_padded,
)
def mixing(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along any dimension that the op does not mix; a softmax along any.

    Further inputs (norm weights) lie along mixed dimensions.
    """
    reaches = spec_of(call.target).reaches
    assert reaches
    mixed = {dim % len(call.shape) for dim in reaches(call)}
    for out in wanted:
        if out.is_shard and (out.dim not in mixed or call.target in SOFTMAXES):
            yield Strategy((out, *(R for _ in call.shapes[1:])), out)


@rule(*SUMS, precision=REDUCTION, scales="linear")
@rule(*MEANS, local=_mean, precision=REDUCTION, scales="linear")
@rule(aten.var.correction, aten.var.dim, precision=REDUCTION)
@rule(aten.prod.dim_int)
@rule(aten.linalg_vector_norm.default, precision=NORM)
@rule(aten.logsumexp.default, local=_reduced, exchanges=(2, 0), precision=SOFTMAX)
@rule(aten.amax.default, aten.amin.default, local=_reduced, exchanges=(1, 1))
@rule(
    aten.argmax.default,
    local=_reduced,
    exchanges=(3, 0),  # an index is twice as wide
    batch_rule=_along,
)
def reduction(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along a kept dimension; a sum or mean over a sharded dimension is partial.

    Maxima and logarithms of sums over a sharded dimension are the same on all ranks.
    """
    rank = len(call.shapes[0])
    reduced = reduced_dims(call)
    keepdim = bool(call.named("keepdim"))
    kept = [dim for dim in range(rank) if dim not in reduced]
    for out in wanted:
        if not out.is_shard:
            continue
        dim = out.dim if keepdim else kept[out.dim]
        if dim in kept:
            yield Strategy((out.along(dim),), out)
    if call.target in SUMS + MEANS:
        yield from (Strategy((S(dim, folded=f),), P) for dim in reduced for f in (False, True))
        yield Strategy((P,), P)
    elif call.target in REDUCED and call.named("dim") is not None:
        yield from (Strategy((S(dim),), I) for dim in reduced)


@form(sharded_logsumexp, aten.logsumexp.default, precision=SOFTMAX, moves=rewrites_input)
@form(sharded_amax, aten.amax.default, moves=rewrites_input)
@form(sharded_amin, aten.amin.default, moves=rewrites_input)
@form(sharded_argmax, aten.argmax.default, moves=rewrites_input)
def reduced_by_ranks(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """One of the reduced dimensions is sharded by construction."""
    given = call.args[1]
    dims = [given] if isinstance(given, int) else given
    yield from (Strategy((S(dim % len(call.shapes[0])),), I) for dim in dims)


@form(sharded_softmax, aten.softmax.int, precision=SOFTMAX, moves=rewrites_input)
@form(sharded_log_softmax, aten.log_softmax.int, precision=SOFTMAX, moves=rewrites_input)
def softmax_by_ranks(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The dimension that sums to one is sharded by construction."""
    dim = call.args[1] % len(call.shape)
    yield from (Strategy((out,), out) for out in wanted if out.is_shard and out.dim == dim)


@form(partial_mean, aten.mean.dim, precision=REDUCTION)
def sharded_mean(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """One of the reduced dimensions is sharded by construction."""
    for dim in (dim % len(call.shapes[0]) for dim in call.args[1]):
        yield from (Strategy((cut,), P) for cut in (S(dim), S(dim, folded=True)))


define(OpSpec(precision=REDUCTION), aten.var.default)
define(OpSpec(precision=NORM), aten.group_norm.default)
define(OpSpec(batch_rule=_batch_norm), aten.batch_norm.default)
define(OpSpec(batch_rule=_along), aten.argmin.default, aten.any.dim, aten.all.dim)
define(OpSpec(batch_rule=_along), aten.argsort.stable, aten.diff.default)
define(OpSpec(batch_rule=_pairing), aten.cosine_similarity.default, aten.pairwise_distance.default)


def exchanged(call: Call, strategy: Strategy) -> tuple[int, int]:
    """Return how many numbers `call` reduces over the ranks under `strategy`: forward, backward.

    (The cross entropy's are not counted: nothing else is as cheap for a vocabulary.)
    """
    forward, backward = spec_of(call.target).exchanges
    if not forward or localize(call, strategy, "")[0] is call.target:
        return 0, 0
    dims = reduced_dims(call)
    kept = prod(n for dim, n in enumerate(call.shapes[0]) if dim not in dims)
    return kept * forward, kept * backward

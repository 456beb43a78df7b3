"""Rules of pointwise ops, of ops that mix values along some dimensions, and of reductions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ilm_compile.ops.reductions import (
    ELEMENTWISE_LOSSES,
    REDUCED,
    SOFTMAXES,
    reduced_dims,
)
from ilm_compile.ops.strategy import TAG_RULES, Call, Strategy, aten, rule
from ilm_compile.program.placement import I, P, Placement, R, S
from ilm_compile.program.reductions import partial_mean
from ilm_compile.program.sharded_reductions import NONE

# Which inputs of a pointwise op may be partial sums. "each": one at a time, the others R (a product
# is linear in each factor); "all": together (a sum); "first": the first only; "": none.
POINTWISE = {
    "each": (aten.mul.Tensor,),
    "all": (aten.add.Tensor, aten.sub.Tensor),
    "first": (
        *(aten.neg.default, aten.clone.default, aten.contiguous.default, aten.detach.default),
        *(aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.zeros_like.default),
    ),
    "": (
        *(aten.relu.default, aten.silu.default, aten.gelu.default, aten.tanh.default),
        *(aten.sigmoid.default, aten.exp.default, aten.log.default, aten.rsqrt.default),
        *(aten.sqrt.default, aten.reciprocal.default, aten.cos.default, aten.sin.default),
        *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.abs.default),
        *(aten.softplus.default, aten.leaky_relu.default, aten.erf.default, aten.square.default),
        *(aten.clamp.default, aten.maximum.default, aten.minimum.default, aten.to.dtype),
        *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
        *(aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.add.Scalar, aten.sub.Scalar),
        *(aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor),
        *(aten.ge.Tensor, aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar),
        *(aten.gt.Scalar, aten.ge.Scalar, aten.__and__.Tensor, aten.__or__.Tensor),
        *(aten.logical_not.default, aten.logical_and.default, aten.bitwise_not.default),
        *(aten.rsub.Scalar, aten.logical_or.default, aten.bitwise_and.Tensor),
        *(aten.log1p.default, aten.expm1.default, aten.log_sigmoid.default, aten.relu6.default),
        *(aten.hardtanh.default, aten.elu.default, aten.mish.default, aten.sign.default),
        *(aten.clamp_min.default, aten.clamp_max.default, aten.remainder.Scalar),
        *(aten.floor.default, aten.round.default, aten.ones_like.default, aten.full_like.default),
    ),
}
_LINEARITY = {target: kind for kind, targets in POINTWISE.items() for target in targets}


@rule(*_LINEARITY)
def pointwise(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Output sharded as wanted; an input that is broadcast along that dimension is R."""
    for out in wanted:
        if out.is_shard and all(is_broadcast(shape, call.shape) for shape in call.shapes):
            yield Strategy(tuple(aligned(shape, call.shape, out) for shape in call.shapes), out)
    count = len(call.shapes)
    kind = _LINEARITY.get(call.target, "")
    if kind == "all" and count == 2:  # with a scalar operand a sum is not linear
        yield Strategy((P, P), P)
    for index in {"each": range(count), "first": range(1)}.get(kind, range(0)):
        yield Strategy(tuple(P if i == index else R for i in range(count)), P)


TAG_RULES[torch.Tag.pointwise] = pointwise


def is_broadcast(shape: tuple[int, ...], out_shape: tuple[int, ...]) -> bool:
    """Whether an operand of `shape` broadcasts to `out_shape`."""
    pairs = zip(reversed(shape), reversed(out_shape), strict=False)
    return len(shape) <= len(out_shape) and all(n in (1, out) for n, out in pairs)


def aligned(shape: tuple[int, ...], out_shape: tuple[int, ...], out: Placement) -> Placement:
    """Return how an operand of `shape` is placed when the broadcast result is placed as `out`."""
    dim = out.dim - (len(out_shape) - len(shape))
    broadcast = dim < 0 or shape[dim] != out_shape[out.dim]
    return R if broadcast else out.along(dim)


# Ops that mix values along some dimensions and are independent along the others: which dimensions
# of the first input they mix. Further inputs (norm weights) lie along mixed dimensions: R.
_MIXING: dict[Any, Callable[[Call], Iterable[int]]] = {
    aten.softmax.int: lambda call: [call.args[1]],
    aten.log_softmax.int: lambda call: [call.args[1]],
    aten.cumsum.default: lambda call: [call.args[1]],
    aten.argsort.default: lambda call: [call.argument(1, "dim", -1)],
    aten.cumprod.default: lambda call: [call.args[1]],
    aten.rms_norm.default: lambda call: range(-len(call.args[1]), 0),
    aten.layer_norm.default: lambda call: range(-len(call.args[1]), 0),
    aten.tril.default: lambda call: (-2, -1),
    aten.triu.default: lambda call: (-2, -1),
    aten.flip.default: lambda call: call.args[1],
    aten.roll.default: lambda call: call.argument(2, "dims") or range(len(call.shape)),
    aten.pad.default: lambda call: range(-len(call.args[1]) // 2, 0),
    aten.constant_pad_nd.default: lambda call: range(-len(call.args[1]) // 2, 0),
}


@rule(*_MIXING)
def mixing(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along any dimension that the op does not mix; a softmax along any."""
    mixed = {dim % len(call.shape) for dim in _MIXING[call.target](call)}
    for out in wanted:
        if out.is_shard and (out.dim not in mixed or call.target in SOFTMAXES):
            yield Strategy((out, *(R for _ in call.shapes[1:])), out)


SUMS = (aten.sum.default, aten.sum.dim_IntList)
MEANS = (aten.mean.default, aten.mean.dim)
_REDUCTIONS = (
    *(*SUMS, *MEANS, *REDUCED),
    *(aten.var.correction, aten.var.dim, aten.prod.dim_int, aten.linalg_vector_norm.default),
)


@rule(*_REDUCTIONS)
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


@rule(*ELEMENTWISE_LOSSES)
def elementwise_loss(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along any dimension, both inputs alike; a sum and a mean are partial."""
    shape, other = call.shapes
    if shape == other and call.argument(2, "reduction", 1) == NONE:
        yield from (Strategy((out, out), out) for out in wanted if out.is_shard)
    elif shape == other:
        cuts = (S(dim, folded=folded) for dim in range(len(shape)) for folded in (False, True))
        yield from (Strategy((cut, cut), P) for cut in cuts)


@rule(partial_mean)
def sharded_mean(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """One of the reduced dimensions is sharded by construction."""
    for dim in (dim % len(call.shapes[0]) for dim in call.args[1]):
        yield from (Strategy((cut,), P) for cut in (S(dim), S(dim, folded=True)))

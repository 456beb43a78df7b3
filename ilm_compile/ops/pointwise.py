"""Pointwise ops, and dropout, whose mask is cut as the value is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from ilm_compile.ops.batch_constants import Values
from ilm_compile.ops.call import Call, Found, LocalCall, Strategy, aten, tensor_inputs
from ilm_compile.ops.precision import CAST, REDUCTION
from ilm_compile.ops.spec import TAG_RULES, OpSpec, Scaling, define, rule
from ilm_compile.program.dropout import seeded_dropout
from ilm_compile.program.layout import Layout
from ilm_compile.program.placement import P, Placement, R, S

# By `OpSpec.scales`, which says what inputs may be partial sums: of a product one at a time, the
# others R; of a sum both together; of what is linear, and of a quotient, the first.
POINTWISE: dict[Scaling, tuple[Any, ...]] = {
    "product": (aten.mul.Tensor, aten.mul.Scalar),
    "quotient": (aten.div.Tensor, aten.div.Scalar),
    "affine": (
        *(aten.add.Tensor, aten.sub.Tensor),
        *(aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar),
    ),
    "linear": (
        *(aten.neg.default, aten.clone.default, aten.contiguous.default, aten.detach.default),
        aten.zeros_like.default,
    ),
    "": (
        *(aten.relu.default, aten.silu.default, aten.gelu.default, aten.tanh.default),
        *(aten.sigmoid.default, aten.exp.default, aten.log.default, aten.rsqrt.default),
        *(aten.sqrt.default, aten.reciprocal.default, aten.cos.default, aten.sin.default),
        *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.abs.default),
        *(aten.softplus.default, aten.leaky_relu.default, aten.erf.default, aten.square.default),
        *(aten.clamp.default, aten.maximum.default, aten.minimum.default, aten.to.dtype),
        *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar),
        *(aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor),
        *(aten.ge.Tensor, aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar),
        *(aten.gt.Scalar, aten.ge.Scalar, aten.__and__.Tensor, aten.__or__.Tensor),
        *(aten.logical_not.default, aten.logical_and.default, aten.logical_or.default),
        *(aten.bitwise_not.default, aten.bitwise_and.Tensor, aten.masked_fill.Scalar),
        *(aten.log1p.default, aten.expm1.default, aten.log_sigmoid.default, aten.relu6.default),
        *(aten.hardtanh.default, aten.elu.default, aten.mish.default, aten.sign.default),
        *(aten.clamp_min.default, aten.clamp_max.default, aten.remainder.Scalar),
        aten.masked_fill.Tensor,
        *(aten.floor.default, aten.round.default, aten.ones_like.default, aten.full_like.default),
    ),
}
_LINEARITY = {target: kind for kind, targets in POINTWISE.items() for target in targets}


def pointwise(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Output sharded as wanted; an input that is broadcast along that dimension is R."""
    for out in wanted:
        if out.is_shard and all(is_broadcast(shape, call.shape) for shape in call.shapes):
            yield Strategy(tuple(aligned(shape, call.shape, out) for shape in call.shapes), out)
    count = len(call.shapes)
    kind = _LINEARITY.get(call.target, "")
    if kind == "affine" and count == 2:  # with a scalar operand a sum is not linear
        yield Strategy((P, P), P)
    singly = {"product": count, "quotient": 1, "linear": 1}
    for index in range(singly.get(kind, 0)):
        yield Strategy(tuple(P if i == index else R for i in range(count)), P)


def is_broadcast(shape: tuple[int, ...], out_shape: tuple[int, ...]) -> bool:
    """Whether an operand of `shape` broadcasts to `out_shape`."""
    pairs = zip(reversed(shape), reversed(out_shape), strict=False)
    return len(shape) <= len(out_shape) and all(n in (1, out) for n, out in pairs)


def broadcast_shape(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Return the shape to which operands of `shapes` broadcast."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def aligned(shape: tuple[int, ...], out_shape: tuple[int, ...], out: Placement) -> Placement:
    """Return how an operand of `shape` is placed when the broadcast result is placed as `out`."""
    dim = out.dim - (len(out_shape) - len(shape))
    broadcast = dim < 0 or shape[dim] != out_shape[out.dim]
    return R if broadcast else out.along(dim)


def _chosen(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """A sum or another one, or 0, by what is the same for all: where there is any target."""
    places = [(P, R) if values.is_zero(n) else (P,) for n in tensor_inputs(call.node)[1:]]
    yield from (((R, *pair), P, 0) for pair in product(*places) if P in pair)


def _counted(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """What slices counted adds up in other numbers too."""
    if call.named("dtype") != torch.bool:
        yield (P,), P, 0


def _each(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    for dim in range(len(call.shape)):
        yield tuple(aligned(shape, call.shape, S(dim)) for shape in call.shapes), S(dim), 0


# What is known of some of them besides.
_FURTHER = {
    **dict.fromkeys(
        (
            *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar),
            *(aten.rsqrt.default, aten.exp.default, aten.log.default),
        ),
        OpSpec(precision=REDUCTION),
    ),
    aten.contiguous.default: OpSpec(carries=True),
    aten.to.dtype: OpSpec(precision=CAST, batch_rule=_counted, scales="linear"),  # but for rounding
    aten.where.self: OpSpec(batch_rule=_chosen),
}
for _target, _scales in _LINEARITY.items():
    _further = _FURTHER.get(_target, OpSpec())
    define(replace(_further, rule=pointwise, scales=_further.scales or _scales), _target)
define(OpSpec(batch_rule=_each), aten.floor_divide.default)
TAG_RULES[torch.Tag.pointwise] = pointwise


def _dropout(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    layout = Layout.parse(call.args[4]).with_placement(axis, strategy.output)
    return call.target, (*call.args[:4], str(layout)), {}


@rule(seeded_dropout, local=_dropout, probability=(2, "probability"))
def dropout(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded as wanted, since the mask is cut like the value; linear for a given mask."""
    for out in wanted:
        if out.is_shard:
            yield Strategy((out, R), out)
    yield Strategy((P, R), P)


define(OpSpec(probability=(1, "p")), aten.dropout.default)

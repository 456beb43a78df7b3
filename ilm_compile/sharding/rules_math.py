"""Rules of pointwise ops, matrix products, norms and reductions.

Matrix products are written as einsum letters. For a letter that the output keeps, inputs that carry
it are sharded on it and the others are R, since their gradient is a sum over the shards. For a
contracted letter the output is P, and so is an added bias: it must be counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ilm_compile.program.placement import P, Placement, R, S
from ilm_compile.sharding.strategy import Call, Strategy, aten, rule

# Which inputs of a pointwise op may be partial sums. "each": one at a time, the others R (a product
# is linear in each factor); "all": together (a sum); "first": the first only; "": none.
POINTWISE = {
    "each": (aten.mul.Tensor,),
    "all": (aten.add.Tensor, aten.sub.Tensor),
    "first": (
        *(aten.neg.default, aten.clone.default, aten.contiguous.default, aten.detach.default),
        *(aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar),
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
    ),
}
_LINEARITY = {target: kind for kind, targets in POINTWISE.items() for target in targets}


@rule(*_LINEARITY)
def pointwise(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Output sharded as wanted; an input that is broadcast along that dimension is R."""
    for out in wanted:
        if out.is_shard:
            yield Strategy(tuple(aligned(shape, call.shape, out) for shape in call.shapes), out)
    count = len(call.shapes)
    kind = _LINEARITY[call.target]
    if kind == "all" and count == 2:  # with a scalar operand a sum is not linear
        yield Strategy((P, P), P)
    for index in {"each": range(count), "first": range(1)}.get(kind, range(0)):
        yield Strategy(tuple(P if i == index else R for i in range(count)), P)


def aligned(shape: tuple[int, ...], out_shape: tuple[int, ...], out: Placement) -> Placement:
    """Return how an operand of `shape` is placed when the broadcast result is placed as `out`."""
    dim = out.dim - (len(out_shape) - len(shape))
    broadcast = dim < 0 or shape[dim] != out_shape[out.dim]
    return R if broadcast else S(dim, out.segments)


def _linear(call: Call) -> tuple[list[str], str]:
    batch = "abcdefg"[: len(call.shape) - 1]
    return [batch + "k", "nk", "n"][: len(call.shapes)], batch + "n"


def _matmul(call: Call) -> tuple[list[str], str]:
    left, right = call.shapes
    batch = "abcdefg"[: len(left) - 2]
    if len(right) == 2 and len(left) >= 2:
        return [batch + "mk", "kn"], batch + "mn"
    if len(left) == len(right) >= 3 and left[:-2] == right[:-2]:
        return [batch + "mk", batch + "kn"], batch + "mn"
    return ["", ""], ""


# The einsum of each product, and the input that is added to it and not multiplied.
_PRODUCTS = {
    aten.linear.default: (_linear, 2),
    aten.matmul.default: (_matmul, None),
    aten.mm.default: (lambda call: (["mk", "kn"], "mn"), None),
    aten.bmm.default: (lambda call: (["amk", "akn"], "amn"), None),
    aten.addmm.default: (lambda call: (["n", "mk", "kn"], "mn"), 0),
    aten.baddbmm.default: (lambda call: (["amn", "amk", "akn"], "amn"), 0),
}


@rule(*_PRODUCTS)
def product(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Shard on a letter of the einsum: column-wise, row-wise, or by batch and tokens."""
    letters, added = _PRODUCTS[call.target]
    inputs, output = letters(call)
    if any(len(term) != len(shape) for term, shape in zip(inputs, call.shapes, strict=True)):
        return
    for out in wanted:
        if out.is_shard:
            letter = output[out.dim]
            yield Strategy(
                tuple(S(t.index(letter), out.segments) if letter in t else R for t in inputs), out
            )
    for letter in sorted(set("".join(inputs)) - set(output)):
        yield Strategy(tuple(S(t.index(letter)) if letter in t else P for t in inputs), P)
    for partial in range(len(inputs)):
        if partial != added:
            kinds = [P if i in (partial, added) else R for i in range(len(inputs))]
            yield Strategy(tuple(kinds), P)


# Ops that mix values along some dimensions and are independent along the others: which dimensions
# of the first input they mix. Further inputs (norm weights) lie along mixed dimensions: R.
_MIXING: dict[Any, Callable[[Call], Iterable[int]]] = {
    aten.softmax.int: lambda call: [call.args[1]],
    aten.log_softmax.int: lambda call: [call.args[1]],
    aten.cumsum.default: lambda call: [call.args[1]],
    aten.rms_norm.default: lambda call: range(-len(call.args[1]), 0),
    aten.layer_norm.default: lambda call: range(-len(call.args[1]), 0),
}


@rule(*_MIXING)
def mixing(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along any dimension that the op does not mix."""
    mixed = {dim % len(call.shape) for dim in _MIXING[call.target](call)}
    for out in wanted:
        if out.is_shard and out.dim not in mixed:
            yield Strategy((out, *(R for _ in call.shapes[1:])), out)


@rule(aten.sum.default, aten.sum.dim_IntList, aten.mean.dim, aten.mean.default)
def reduction(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along a kept dimension; a sum over a sharded dimension is partial."""
    rank = len(call.shapes[0])
    dims = call.args[1] if len(call.args) > 1 and call.args[1] else range(rank)
    reduced = sorted(dim % rank for dim in dims)
    keepdim = bool(call.argument(2, "keepdim", False))
    kept = [dim for dim in range(rank) if dim not in reduced]
    for out in wanted:
        if not out.is_shard:
            continue
        dim = out.dim if keepdim else kept[out.dim]
        if dim in kept:
            yield Strategy((S(dim, out.segments),), out)
    if call.target in (aten.sum.default, aten.sum.dim_IntList):
        yield from (Strategy((S(dim),), P) for dim in reduced)
    yield Strategy((P,), P)

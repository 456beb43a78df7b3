"""Views: ops that rename, split, merge, repeat or pick dimensions and compute nothing.

A reshape is read as a common refinement of its two shapes: a row of factors whose consecutive
products give the input's dimensions and, grouped otherwise, the output's. Sharding one factor
shards the input dimension and the output dimension that contain it. Where the factor is not the
outermost one of its dimension, that dimension is sharded in segments: this is how InternLM's Wqkv,
rows (three heads dim), is sharded by heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from torch import fx

from ilm_compile.ops.batch_constants import Values
from ilm_compile.ops.call import Arguments, Call, Found, LocalCall, Strategy, aten, tensor_inputs
from ilm_compile.ops.spec import OpSpec, define, rule
from ilm_compile.ops.strategy import global_call
from ilm_compile.program.layout import MeshAxis, layout_of
from ilm_compile.program.placement import P, Placement, R, S
from ilm_compile.program.values import is_tuple


class Factor(NamedTuple):
    """One factor of a reshape: where it lies on both sides, and what is outside it there."""

    size: int
    in_dim: int
    in_outer: int
    out_dim: int
    out_outer: int


def refine(shape: tuple[int, ...], out_shape: tuple[int, ...]) -> list[Factor]:
    """Return the common refinement of two shapes of equal size, as far as one exists.

    Dimensions of size 1 have no factor. Where the shapes do not nest (6 = 2*3 against 3*2) the
    factors from there on are left out, so such dimensions are simply not sharded.
    """
    factors: list[Factor] = []
    i = o = 0
    left_in = left_out = 1
    in_outer = out_outer = 1
    while True:
        while left_in == 1 and i < len(shape):
            left_in, in_outer, i = shape[i], 1, i + 1
        while left_out == 1 and o < len(out_shape):
            left_out, out_outer, o = out_shape[o], 1, o + 1
        common = min(left_in, left_out)
        if common <= 1 or left_in % common or left_out % common:
            return factors
        factors.append(Factor(common, i - 1, in_outer, o - 1, out_outer))
        left_in, left_out = left_in // common, left_out // common
        in_outer, out_outer = in_outer * common, out_outer * common


def _sharded(dim: int, dim_size: int, outer: int, *, folded: bool = False) -> Placement:
    return S(dim, (dim_size // outer,) * outer, folded=folded)


def _sizes(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    sizes = list(strategy.output.local_shape(call.shape, call.size))
    return call.target, (call.args[0], sizes, *call.args[2:]), call.kwargs


@rule(aten.reshape.default, local=_sizes, carries=True, sized=True)
def reshape(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Shard any factor of the common refinement; a dimension kept whole passes segments through."""
    (shape,) = call.shapes
    for factor in refine(shape, call.shape):
        whole = factor.size == shape[factor.in_dim] == call.shape[factor.out_dim]
        if whole:
            for out in wanted:
                if out.is_shard and out.dim == factor.out_dim:
                    yield Strategy((out.along(factor.in_dim),), out)
            continue
        for folded in (False, True):
            if factor.size % (call.size * (1 + folded)) == 0:
                source = _sharded(
                    factor.in_dim, shape[factor.in_dim], factor.in_outer, folded=folded
                )
                size = call.shape[factor.out_dim]
                out = _sharded(factor.out_dim, size, factor.out_outer, folded=folded)
                if out in wanted:
                    yield Strategy((source,), out)
        if factor.in_outer == factor.out_outer == 1:
            yield from _outermost(call, factor, wanted)
    yield Strategy((P,), P)


def _outermost(call: Call, factor: Factor, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Yield the segments that the outermost factor of two dimensions keeps: rows of (rows, k)."""
    inner, out_inner = (
        sizes[dim] // factor.size
        for sizes, dim in ((call.shapes[0], factor.in_dim), (call.shape, factor.out_dim))
    )
    for out in wanted:
        if out.segments and out.dim == factor.out_dim and out.is_shard:
            if all(n % (out_inner * call.size) == 0 for n in out.segments):
                parts = [n // out_inner * inner for n in out.segments]
                yield Strategy((S(factor.in_dim, parts, folded=out.folded),), out)


def cuts_of(node: fx.Node, axis: MeshAxis, dim: int) -> set[Placement]:
    """Return the ways to shard a value along `dim` so that what it was made of is cut evenly.

    Rows (batch, tokens) that became one dimension are cut in segments where the tokens are. Each
    way comes folded too.
    """
    found, seen, pending = {S(dim)}, {node}, [node]
    size = axis.shape(node)[dim]
    while pending:
        value = pending.pop()
        if value.op != "call_function":
            continue
        for source in tensor_inputs(value):
            if source in seen or is_tuple(source):
                continue
            seen.add(source)
            if axis.shape(source)[dim : dim + 1] == (size,):
                pending.append(source)
            elif value.target is aten.reshape.default:
                factors = refine(axis.shape(source), axis.shape(value))
                outer = {f.out_outer for f in factors if f.out_dim == dim and f.size > 1}
                found |= {_sharded(dim, size, n) for n in outer}
    return found | {replace(cut, folded=True) for cut in found}


@rule(aten.expand.default, local=_sizes, carries=True, sized=True)
def expand(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along a dimension that is kept; from R along one that is repeated."""
    (shape,) = call.shapes
    for out in wanted:
        if out.is_shard:
            dim = out.dim - (len(call.shape) - len(shape))
            kept = dim >= 0 and shape[dim] == call.shape[out.dim]
            yield Strategy((out.along(dim) if kept else R,), out)
    yield Strategy((P,), P)


def _permute(call: Call) -> list[int]:
    return [dim % len(call.shape) for dim in call.args[1]]


def _transpose(call: Call) -> list[int]:
    rank = len(call.shape)
    order = list(range(rank))
    a, b = (call.args[1] % rank, call.args[2] % rank) if len(call.args) > 2 else (0, rank - 1)
    order[a], order[b] = order[b], order[a]
    return order


def _unsqueeze(call: Call) -> list[int]:
    dim = call.args[1] % len(call.shape)
    rank = len(call.shape) - 1
    return [*range(dim), -1, *range(dim, rank)]


def _squeeze(call: Call) -> list[int]:
    dim = call.args[1] % len(call.shapes[0])
    if call.shapes[0][dim] == 1:
        return [d for d in range(len(call.shapes[0])) if d != dim]
    # Nothing is squeezed, and must not be on a rank that holds one slice of this dimension.
    return [-1 if d == dim else d for d in range(len(call.shapes[0]))]


def _select(call: Call) -> list[int]:
    dim = call.args[1] % len(call.shapes[0])
    return [d for d in range(len(call.shapes[0])) if d != dim]


# Views that only rename dimensions: the input dimension behind each output dimension (-1: none).
_RENAMING = {
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.select.int: _select,
}


VIEWS = {*_RENAMING, aten.reshape.default, aten.expand.default, aten.slice.Tensor}


@rule(*(aten.permute.default, aten.transpose.int, aten.unsqueeze.default), carries=True)
@rule(aten.t.default, aten.squeeze.dim, scales="linear")
@rule(aten.select.int, carries=True, cuts=True)
def renaming(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The output's shard dimension, traced back to the input's."""
    sources = _RENAMING[call.target](call)
    for out in wanted:
        if out.is_shard and sources[out.dim] >= 0:
            yield Strategy((out.along(sources[out.dim]),), out)
    yield Strategy((P,), P)


def slice_bounds(call: Call) -> tuple[int, int, int, int]:
    """Return (dim, start, end, step) of a slice, made non-negative and cut to the dimension."""
    shape = call.shapes[0]
    dim = call.argument(1, "dim", 0) % len(shape)
    start, end, step = (call.argument(i, n) for i, n in ((2, "start"), (3, "end"), (4, "step")))
    first, last, _ = slice(start, end, step).indices(shape[dim])
    return dim, first, last, step or 1


def _global_slice(node: fx.Node, inputs: tuple[fx.Node, ...], axis: MeshAxis) -> Arguments:
    source = inputs[0]
    x, dim, *bounds = node.args
    for name, placement in layout_of(source).shards(axis.sizes) if bounds else ():
        if placement.dim == dim % source.meta["val"].dim():
            bounds[:2] = [bound * axis.sizes[name] for bound in bounds[:2]]  # type: ignore[operator]
    return (x, dim, *bounds), dict(node.kwargs)


def _slice(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    dim, start, end, step = slice_bounds(call)
    if strategy.inputs[0].is_shard and strategy.inputs[0].dim == dim:
        start, end = start // call.size, end // call.size
    return call.target, (call.args[0], dim, start, end, step), {}


def _every_nth(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Of every group of neighbouring rows the same one: chosen and rejected answers in turns."""
    (shape,) = call.shapes
    dim, step = call.argument(1, "dim", 0) % len(shape), call.argument(4, "step", 1)
    start, end = call.argument(2, "start") or 0, call.argument(3, "end")
    whole = end is None or end >= shape[dim]
    if 0 <= start < step and whole and shape[dim] % (step * call.size) == 0:
        yield (S(dim),), S(dim), 0


@rule(
    aten.slice.Tensor,
    local=_slice,
    global_arguments=_global_slice,
    batch_rule=_every_nth,
    cuts=True,
    carries=True,
    sized=True,
)
def slicing(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along the other dimensions; along this one when the slice is a run of whole segments.

    The segments are those that all slices of the same value cut it into: q | k | v.
    """
    dim, start, end, step = slice_bounds(call)
    for out in wanted:
        if out.is_shard and out.dim != dim:
            yield Strategy((out,), out)
    if step == 1:
        for out in wanted:
            for segments in _segmentations(call, dim, start, end, out):
                yield Strategy((S(dim, segments),), out)
    yield Strategy((P,), P)


def _segmentations(
    call: Call, dim: int, start: int, end: int, out: Placement
) -> Iterator[list[int]]:
    """Yield the ways to cut the whole dimension so that this slice of it is placed as `out`.

    The slice's own segments lie between `start` and `end`. What lies outside is cut where the other
    slices of the same value cut it, or where it is cut already.
    """
    source: Any = call.node.args[0]
    placed = call.axis.placement(source)
    cuts = set(accumulate(placed.segments)) if placed.dim == dim else set()
    for user in source.users:
        if user.target is call.target and user.args[0] is source:
            sibling, *bounds, step = slice_bounds(global_call(user, call.axis))
            cuts |= set(bounds) if sibling == dim and step == 1 else set()
    if not out.is_shard or out.folded or out.dim != dim or end - start == call.shapes[0][dim]:
        return
    inner = {start, *(start + n for n in accumulate(out.segments or (end - start,)))}
    edges = sorted({0, call.shapes[0][dim]} | inner | {c for c in cuts if not start < c < end})
    yield [b - a for a, b in pairwise(edges)]


@rule(aten.cat.default, scales="linear")
def cat(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along the other dimensions; along this one in one segment per input."""
    dim = call.argument(1, "dim", 0) % len(call.shape)
    sizes = [shape[dim] for shape in call.shapes]
    for out in wanted:
        if out.is_shard and (out.dim != dim or out.segments == tuple(sizes)):
            one = replace(out, segments=()) if out.dim == dim else out
            yield Strategy(tuple(one for _ in sizes), out)
    yield Strategy((P,) * len(sizes), P)


@rule(aten.stack.default, scales="linear")
def stack(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along any dimension but the new one."""
    dim = call.argument(1, "dim", 0) % len(call.shape)
    for out in wanted:
        if out.is_shard and out.dim != dim:
            source = out.along(out.dim - (out.dim > dim))
            yield Strategy((source,) * len(call.shapes), out)
    yield Strategy((P,) * len(call.shapes), P)


def _squeezed(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    kept = [dim for dim, n in enumerate(call.shapes[0]) if n != 1]
    if len(kept) == len(call.shape):
        yield from (((S(dim),), S(index), 0) for index, dim in enumerate(kept))


def _unfolded(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    over = call.args[1] % len(call.shapes[0])
    yield from (((S(dim),), S(dim), 0) for dim in range(len(call.shapes[0])) if dim != over)


def _complex(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Real and imaginary parts are the last dimension."""
    for dim in range(min(len(call.shape), len(call.shapes[0]))):
        yield (S(dim),), S(dim), 0


define(OpSpec(batch_rule=_unfolded), aten.unfold.default)
define(OpSpec(batch_rule=_complex), aten.view_as_complex.default, aten.view_as_real.default)
define(OpSpec(batch_rule=_squeezed), aten.squeeze.default, aten.squeeze.dims)

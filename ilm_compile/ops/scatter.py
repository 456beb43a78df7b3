"""Ops that write into a copy of their first input: what in-place assignments become.

All are linear in the two values together, so with a partial sum of both they give a partial sum.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ilm_compile.ops.batch_constants import Values
from ilm_compile.ops.call import Call, Found, Strategy, aten, tensor_inputs
from ilm_compile.ops.lookups import indexed_dims
from ilm_compile.ops.pointwise import aligned
from ilm_compile.ops.spec import rule
from ilm_compile.program.placement import P, Placement, R, S


@rule(aten.slice_scatter.default, aten.select_scatter.default)
def slice_scatter(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along the dimensions that are not sliced."""
    dim = call.named("dim") % len(call.shape)
    lost = call.target is aten.select_scatter.default  # the written value lacks `dim`
    for out in wanted:
        if out.is_shard and out.dim != dim:
            yield Strategy((out, out.along(out.dim - (lost and out.dim > dim))), out)
    yield Strategy((P, P), P)


@rule(aten.scatter.src, aten.scatter_add.default, aten.scatter.value)
def scatter(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded, indices and values alike, along the other dimensions where all agree in size."""
    dim = call.args[1] % len(call.shape)
    for out in wanted:
        if out.is_shard and out.dim != dim:
            if all(shape[out.dim] == call.shape[out.dim] for shape in call.shapes):
                yield Strategy((out,) * len(call.shapes), out)
    if len(call.shapes) == 3:
        yield Strategy((P, R, P), P)


@rule(aten.index_add.default, aten.index_copy.default)
def index_add(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along the dimensions that are not indexed."""
    dim = call.args[1] % len(call.shape)
    for out in wanted:
        if out.is_shard and out.dim != dim:
            yield Strategy((out, R, out), out)
    yield Strategy((P, R, P), P)


def _masked(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """``x[mask] = number``."""
    mask, *more = tensor_inputs(call.node)[1:-1]
    if not more and mask.meta["val"].dtype == torch.bool and call.shapes[-1] == ():
        yield from (((S(dim), S(dim), R), S(dim), 0) for dim in range(len(call.shapes[1])))


@rule(aten.index_put.default, batch_rule=_masked)
def index_put(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along a dimension that is not indexed; the written values are broadcast."""
    indices = call.args[1]
    positions = [i for i, entry in enumerate(indices) if entry is not None]
    rest = tuple(R for _ in positions)
    yield Strategy((P, *rest, P), P)
    found = indexed_dims(positions, call.shapes[1:-1])
    is_mask = any(indices[i].meta["val"].dtype == torch.bool for i in positions)
    if found is None or is_mask:  # a mask stands for several dimensions at once
        return
    first, added = found
    written = list(call.shape)
    written[first : first + len(positions)] = [1] * added
    for out in wanted:
        if out.is_shard and out.dim not in positions:
            dim = out.dim if out.dim < first else out.dim + added - len(positions)
            value = call.shapes[-1]
            shape = (*written[:dim], call.shape[out.dim], *written[dim + 1 :])
            yield Strategy((out, *rest, aligned(value, shape, out.along(dim))), out)

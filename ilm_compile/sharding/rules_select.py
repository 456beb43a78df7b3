"""Rules of ops that pick rows: indexing, gathering, and the grouped matrix products of experts."""

from __future__ import annotations

from collections.abc import Iterator

from ilm_compile.program.placement import P, Placement, R, S
from ilm_compile.sharding.strategy import Call, Strategy, aten, rule


@rule(aten.index.Tensor)
def index(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along a dimension that is not indexed; the indices are R.

    For index tensors on neighbouring dimensions, whose broadcast shape takes the place of these.
    """
    indices = call.args[1]
    rank = len(call.shapes[0])
    positions = [i for i, entry in enumerate(indices) if entry is not None]
    first, last = positions[0], positions[-1]
    rest = tuple(R for _ in call.shapes[1:])
    yield Strategy((P, *rest), P)
    if len(positions) != last - first + 1:
        return
    added = len(call.shape) - (rank - len(positions))
    for out in wanted:
        if not out.is_shard or first <= out.dim < first + added:
            continue
        dim = out.dim if out.dim < first else out.dim - added + len(positions)
        yield Strategy((S(dim, out.segments), *rest), out)


@rule(aten.gather.default)
def gather(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded, values and indices alike, along the other dimensions where they agree in size."""
    dim = call.args[1] % len(call.shape)
    yield Strategy((P, R), P)
    for out in wanted:
        if out.is_shard and out.dim != dim and call.shapes[0][out.dim] == call.shape[out.dim]:
            yield Strategy((out, out), out)


# Grouped products: rows (m, k) times one of (e, k, n) each, chosen by the offsets (e,).
GROUPED = ("transformers::grouped_mm_fallback", "aten::_grouped_mm")


@rule(*GROUPED)
def grouped_product(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Every expert sharded column-wise or row-wise; all ranks see all rows and offsets."""
    if [len(shape) for shape in call.shapes[:2]] != [2, 3]:
        return
    rest = tuple(R for _ in call.shapes[2:])
    for out in wanted:
        if out.is_shard and out.dim == 1:
            yield Strategy((R, S(2, out.segments), *rest), out)
    yield Strategy((S(1), S(1), *rest), P)
    yield Strategy((P, R, *rest), P)

"""Rules of ops that pick rows: indexing, gathering, and the grouped matrix products of experts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from ilm_compile.ops.nodes import op_name
from ilm_compile.ops.strategy import Call, Strategy, aten, rule
from ilm_compile.program.placement import P, Placement, R, S


def indexed_dims(
    positions: list[int], shapes: tuple[tuple[int, ...], ...]
) -> tuple[int, int] | None:
    """Return where the indexed dimensions begin and how many replace them; None if scattered.

    Index tensors on neighbouring dimensions are replaced by their broadcast shape; those on
    dimensions that are not neighbours move it to the front.
    """
    if positions[-1] - positions[0] + 1 != len(positions):
        return None
    return positions[0], max(len(shape) for shape in shapes)


@rule(aten.index.Tensor)
def index(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along a dimension that is not indexed; the indices are R."""
    positions = [i for i, entry in enumerate(call.args[1]) if entry is not None]
    rest = tuple(R for _ in call.shapes[1:])
    yield Strategy((P, *rest), P)
    found = indexed_dims(positions, call.shapes[1:])
    if found is None:
        return
    first, added = found
    for out in wanted:
        if not out.is_shard or first <= out.dim < first + added:
            continue
        dim = out.dim if out.dim < first else out.dim - added + len(positions)
        yield Strategy((out.along(dim), *rest), out)


@rule(aten.index_select.default)
def index_select(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along the dimensions that are not indexed."""
    dim = call.args[1] % len(call.shape)
    yield Strategy((P, R), P)
    for out in wanted:
        if out.is_shard and out.dim != dim:
            yield Strategy((out, R), out)


@rule(aten.gather.default)
def gather(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded, values and indices alike, along the other dimensions where they agree in size.

    Along the indexed dimension, each rank picks what it holds (`sharded_gather`).
    """
    dim = call.args[1] % len(call.shape)
    yield Strategy((P, R), P)
    yield Strategy((S(dim), R), P)
    for out in wanted:
        if out.is_shard and out.dim != dim and call.shapes[0][out.dim] == call.shape[out.dim]:
            yield Strategy((out, out), out)


# Grouped products: rows (m, k) times one of (e, k, n) each, chosen by the offsets (e,).
GROUPED = ("ilm::grouped_product", "transformers::grouped_mm_fallback", "aten::_grouped_mm")
_BATCHED = ("aten::bmm", "aten::matmul", "aten::einsum", "aten::baddbmm")
_VIEWS = ("aten::transpose", "aten::permute", "aten::to")


def _is_weight(node: fx.Node) -> bool:
    """Whether a value is a variable or a view of one."""
    return node.op == "get_attr" or (
        op_name(node) in _VIEWS and all(map(_is_weight, node.all_input_nodes))
    )


def is_expert_weight(node: fx.Node) -> bool:
    """Whether a weight has a matrix for each expert: only products of groups or batches use it."""
    if not _is_weight(node) or len(node.meta["val"].shape) != 3:
        return False
    return bool(node.users) and all(
        op_name(user) in GROUPED + _BATCHED or is_expert_weight(user) for user in node.users
    )


@rule(*GROUPED)
def grouped_product(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Every expert sharded column-wise or row-wise; all ranks see all rows and offsets."""
    if [len(shape) for shape in call.shapes[:2]] != [2, 3]:
        return
    rest = tuple(R for _ in call.shapes[2:])
    for out in wanted:
        if out.is_shard and out.dim == 1:
            yield Strategy((R, out.along(2), *rest), out)
    yield Strategy((S(1), S(1), *rest), P)
    yield Strategy((P, R, *rest), P)

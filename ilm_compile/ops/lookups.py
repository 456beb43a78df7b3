"""Ops that pick rows: embeddings, indexing and gathering, and their forms for sharded tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import fx

from ilm_compile.ops.batch_constants import Values
from ilm_compile.ops.call import Call, Found, LocalCall, Strategy, aten, unchanged
from ilm_compile.ops.nodes import rewrites_input, rewrites_result
from ilm_compile.ops.pointwise import aligned, broadcast_shape
from ilm_compile.ops.precision import LOOKUP
from ilm_compile.ops.spec import OpSpec, Picks, define, form, rule, spec_of
from ilm_compile.program.arguments import argument
from ilm_compile.program.input_graph import graph_from_inputs
from ilm_compile.program.placement import P, Placement, R, S
from ilm_compile.program.program import Lookup, Program
from ilm_compile.program.sharded_reductions import sharded_gather
from ilm_compile.program.vocab import vocab_embedding
from ilm_compile.program.weight_parts import Product, of_embedding, of_vocab_embedding


def _embedding(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if strategy.output != P or strategy.inputs[0] == P:
        return unchanged(call)
    padding_idx = call.argument(2, "padding_idx", -1)
    return vocab_embedding, (*call.args[:2], padding_idx, axis), {}


def _gather(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not strategy.inputs[0].is_shard or strategy.output != P:
        return unchanged(call)
    return sharded_gather, (*call.args[:3], axis), {}


@rule(
    aten.embedding.default,
    local=_embedding,
    precision=LOOKUP,
    reads_rows=True,
    picks=Picks(0, 1, 0, "rows"),
    weight_part=Product(1, 0, 2, of_embedding),
)
def embedding(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """By hidden size, by vocabulary (becomes `vocab_embedding`), or by tokens."""
    yield Strategy((S(1), R), S(len(call.shape) - 1))
    yield Strategy((S(0), R), P)
    for out in wanted:
        if out.is_shard and out.dim < len(call.shape) - 1:
            yield Strategy((R, out), out)


@form(
    vocab_embedding,
    aten.embedding.default,
    precision=LOOKUP,
    moves=rewrites_result,
    weight_part=Product(1, 0, 2, of_vocab_embedding),
)
def sharded_embedding(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The vocabulary is sharded by construction."""
    yield Strategy((S(0), R), P)


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


def _indexed(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """``table[x]``, and ``x[arange(rows), position]``: each row picks something of its own."""
    indices: Any = call.args[1]
    positions = [i for i, entry in enumerate(indices) if entry is not None]
    shapes = call.shapes[1:]
    width = broadcast_shape(shapes)
    if place := indexed_dims(positions, shapes):
        for dim in range(len(width)):
            yield (R, *(aligned(s, width, S(dim)) for s in shapes)), S(place[0] + dim), 0
    counted = values.counts_along(indices[positions[0]])
    if counted is None or positions != list(range(len(positions))):
        return
    rows = S(len(width) - len(shapes[0]) + counted)
    if call.shapes[0][0] == shapes[0][counted]:
        others = (aligned(s, width, rows) for s in shapes[1:])
        yield (S(0), R, *others), rows, 0


@rule(aten.index.Tensor, batch_rule=_indexed, reads_rows=True, scales="linear")
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


@rule(aten.index_select.default, reads_rows=True, scales="linear")
def index_select(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along the dimensions that are not indexed."""
    dim = call.args[1] % len(call.shape)
    yield Strategy((P, R), P)
    for out in wanted:
        if out.is_shard and out.dim != dim:
            yield Strategy((out, R), out)


@rule(aten.gather.default, local=_gather, reads_rows=True, scales="linear")
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


@form(sharded_gather, aten.gather.default, moves=rewrites_input)
def gather_by_ranks(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The indexed dimension is sharded by construction."""
    yield Strategy((S(call.args[1] % len(call.shapes[0])), R), P)


def _one_hot(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    for dim in range(len(call.shapes[0])):
        yield (S(dim),), S(dim), 0


def _searched(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Each row among boundaries of its own, or all among the same."""
    bounds, asked = call.shapes
    if len(bounds) == 1:
        yield from (((R, S(dim)), S(dim), 0) for dim in range(len(asked)))
    else:
        yield from (((S(dim), S(dim)), S(dim), 0) for dim in range(len(asked) - 1))


def find_lookups(program: Program) -> Iterator[Lookup]:
    """Yield the lookups of a program, as traced, whose index follows from the inputs alone.

    Before any pass the sizes are the user's: a padded vocabulary would take an id behind its end
    for one of the compiler's rows, and a sharded one answers zeros to any other.
    """
    for node in program.calls():
        if (picks := spec_of(node.target).picks) is None:
            continue
        source, index = (cast(fx.Node, node.args[n]) for n in (picks.source, picks.index))
        graph = None if index.meta["val"].is_floating_point() else graph_from_inputs(index)
        if graph is None:
            continue
        shape = source.meta["val"].shape
        yield Lookup(
            graph=graph,
            size=int(shape[picks.dim if len(shape) > picks.dim else -1]),
            ignored=argument(node, "ignore_index"),
            what=f"{picks.what} of {source.target if source.op == 'get_attr' else 'the loss'}",
            where=program.where(node),
        )


define(OpSpec(batch_rule=_one_hot), aten.one_hot.default)
define(OpSpec(batch_rule=_searched), aten.searchsorted.Tensor)

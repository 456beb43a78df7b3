"""Mixtures of experts: their grouped products, and rows in the order of their experts.

Rows are T, D and E (see `ilm_compile.program.placement`). Between the sort and its inverse each row
is computed alone. So what holds for rows that are cut evenly holds for any rows: the rules of such
ops are those for S(0), read with another kind. Only the grouped product knows of experts; sort and
inverse say which tokens the rows are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from torch import fx

from ilm_compile.ops.call import Call, Strategy, aten
from ilm_compile.ops.fused import glu, norm
from ilm_compile.ops.nodes import op_name, rewrites_result
from ilm_compile.ops.pointwise import pointwise
from ilm_compile.ops.precision import MOVE, PRODUCT
from ilm_compile.ops.products import product_from
from ilm_compile.ops.reductions import mixing
from ilm_compile.ops.spec import OpSpec, define, rule, spec_of
from ilm_compile.ops.strategy import ROW_RULES, localize
from ilm_compile.program.arguments import argument
from ilm_compile.program.counts import count_classes
from ilm_compile.program.expert_rows import (
    expert_order,
    grouped_product,
    route,
    sort_rows,
    unsort_rows,
)
from ilm_compile.program.input_graph import reached
from ilm_compile.program.placement import C, D, E, I, P, Placement, R, S, rows_of
from ilm_compile.program.values import is_real, shapes_of
from ilm_compile.program.weight_parts import Product, of_grouped, of_groups, of_rows

KINDS = "TDE"
COUNTS = (aten.histc.default, count_classes)
_ROWWISE = (aten.slice.Tensor, aten.unsqueeze.default, aten.linear.default)
_ROW_RULES = (pointwise, mixing, norm, glu)
_SUMMED = (aten.cumsum.default, aten.to.dtype)  # over experts, after which counts end rows
MOST_SEGMENTS = 64  # in how many parts rows that are counted may lie: the rows of a micro-batch


# Grouped products: rows (m, k) times one of (e, k, n) each, chosen by the offsets (e,).
GROUPED = ("ilm::grouped_product", "transformers::grouped_mm_fallback", "aten::_grouped_mm")
_FLOPS = product_from(0)
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


@rule(GROUPED[0], flops=_FLOPS, precision=PRODUCT, weight_part=Product(0, 1, 3, of_rows))
@rule(GROUPED[1], flops=_FLOPS, precision=PRODUCT)
@rule(GROUPED[2], flops=_FLOPS, precision=PRODUCT, weight_part=Product(0, 1, 3, of_grouped))
def grouped(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Every expert sharded column-wise or row-wise; all ranks see all rows and offsets."""
    if [len(shape) for shape in call.shapes[:2]] != [2, 3]:
        return
    rest = tuple(R for _ in call.shapes[2:])
    for out in wanted:
        if out.is_shard and out.dim == 1:
            yield Strategy((R, out.along(2), *rest), out)
    yield Strategy((S(1), S(1), *rest), P)
    yield Strategy((P, R, *rest), P)


def offsets_of(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return the values between a sort of rows by experts and its inverse, each with the offsets.

    The offsets, which end the rows of each expert, are a grouped product's; they map to themselves.
    """
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) in GROUPED:
            offsets = argument(node, "offs")
            if isinstance(offsets, fx.Node) and (between := _between(node)):
                found |= dict.fromkeys([*between, offsets], offsets)
    return found


def _between(node: fx.Node) -> set[fx.Node]:
    """Return the rows that lead to a grouped product or follow from it; none if none come back."""
    rows = node.meta["val"].shape[0]
    found = set(reached([node], lambda n: [] if n.target is unsort_rows else n.users))
    after = {n for n in found if n.target is not unsort_rows}
    if after == found:
        return set()

    def before(n: fx.Node) -> list[fx.Node]:
        return [x for x in n.all_input_nodes if n.target is not sort_rows and _rows(x, rows)]

    return after.union(reached(after, before))


def _rows(node: fx.Node, rows: int) -> bool:
    return node.op == "call_function" and shapes_of(node)[0][:1] == (rows,)


def routing(graph: fx.Graph) -> set[fx.Node]:
    """Return the values that say which row goes to which expert, integers and masks of rows."""
    orders = list(graph.find_nodes(op="call_function", target=expert_order))
    chosen = reached(orders, lambda n: [x for x in n.all_input_nodes if not is_real(x)])
    return {*chosen, *reached(orders, lambda n: filter(_says_of_rows, n.users))}


def _says_of_rows(node: fx.Node) -> bool:
    return node.op != "output" and (len(shapes_of(node)[0]) == 1 or not is_real(node))


@rule(expert_order, moves=rewrites_result)
def order(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Of its own rows each rank finds the order alone."""
    yield from (Strategy((rows_of("S", out),), out) for out in wanted if out.kind == "T")


@rule(sort_rows, carries=True, moves=rewrites_result)
def sort(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Each rank sorts its own rows; or all, of which it has some columns."""
    repeats = call.args[2]
    yield Strategy((P, R), P)
    for out in wanted:
        if out.kind == "T" and all(n % repeats == 0 for n in out.segments):
            tokens = replace(rows_of("S", out), segments=tuple(n // repeats for n in out.segments))
            yield Strategy((tokens, out), out)
        if out.is_shard and out.dim > 0:
            yield Strategy((out, R), out)


@rule(unsort_rows, carries=True, moves=rewrites_result)
def unsort(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Each rank puts its own rows back; or all, of which it has some columns."""
    yield Strategy((P, R), P)
    for out in wanted:
        if out.is_shard:
            rows = rows_of("T", out)
            yield Strategy((out, R) if out.dim else (rows, rows), out)


@rule(*COUNTS)
def count(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """What each rank counts of its own rows adds up, between bounds that are the same for all."""
    histogram = call.target is aten.histc.default
    if histogram and argument(call.node, "min") == argument(call.node, "max"):
        return  # the values themselves are the bounds
    rows, with_weights = call.shapes[0][0], len(call.shapes) == 2
    for parts in range(1, min(rows, MOST_SEGMENTS) + 1):
        if rows % parts == 0:
            for folded in (False, True):
                tokens = S(0, (rows // parts,) * parts, folded=folded)
                for lie in (tokens, rows_of("T", tokens)):
                    yield Strategy((lie,) * len(call.shapes), P)
                if C in wanted and not with_weights:
                    yield Strategy((rows_of("T", tokens),), C)
    if with_weights:
        yield Strategy((R, P), P)  # a sum of weights


def rows(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """What each row of T, D or E gives on its own."""
    for out in wanted:
        if out == C and call.target in _SUMMED:
            yield Strategy((C,), C)
        if out.kind not in KINDS:
            continue
        if op_name(call.node) in GROUPED:
            yield from _grouped(call, out)
        elif call.target is aten.index.Tensor:
            if len(call.args[1]) == 1 and [len(s) for s in call.shapes[1:]] == [1]:
                yield Strategy((R, out), out)
        elif call.target in _ROWWISE or spec_of(call.target).rule in _ROW_RULES:
            yield from _as_rows(call, out)


def _grouped(call: Call, out: Placement) -> Iterator[Strategy]:
    if len(call.shapes) == 3:
        weights, offsets = {"T": (R, C), "D": (S(0), D), "E": (S(0), E)}[out.kind]
        yield Strategy((out, weights, offsets), out)


def _as_rows(call: Call, out: Placement) -> Iterator[Strategy]:
    even = rows_of("S", out)
    found = spec_of(call.target).rule
    for inputs, output in found(call, frozenset({even})) if found else ():
        local, *_ = localize(call, Strategy(inputs, output), call.axis.name)
        if local is call.target and output == even and set(inputs) <= {even, R} and even in inputs:
            yield Strategy(tuple(out if p == even else p for p in inputs), out)


ROW_RULES.append(rows)


def routed(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Rows moved over another axis: those of this axis's own tokens, or some columns, move alike.

    The offsets are integers: without a gradient, I and R are the same.
    """
    if call.args[0] is call.args[1]:
        yield from (Strategy((same, same), same) for same in (I, R, C))
        return
    for out in {P, *wanted}:
        if out.kind == "T":
            yield Strategy((out, C), out)
        if out == P or (out.is_shard and out.dim > 0):
            yield from (Strategy((out, same), out) for same in (I, R))
    yield from (Strategy(pair, pair[0]) for pair in product((I, R), (I, R)))


define(OpSpec(other_axis=routed, precision=MOVE, carries=True, moves=rewrites_result), route)
define(
    OpSpec(moves=rewrites_result, weight_part=Product(0, 1, 3, of_groups)),
    grouped_product,
)

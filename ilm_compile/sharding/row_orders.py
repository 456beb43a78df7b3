"""Where the rows of the batch lie once a model has moved them by integers.

A mixture of experts sorts its rows by expert, computes each alone and puts them back. What that
gives does not depend on which rows are beside one, so long as an order is used for nothing but
moving rows, moved rows meet only rows that were moved alike, and a grouped product gets the
counts of what the rows were sorted by. Any other use of an order says how many rows come before
one, as a limit of rows per expert does, and so mixes rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import fx

from ilm_compile.ops.batch_constants import Values
from ilm_compile.ops.call import aten, tensor_inputs
from ilm_compile.ops.experts import GROUPED
from ilm_compile.ops.nodes import op_name
from ilm_compile.program.arguments import argument
from ilm_compile.program.placement import P, Placement
from ilm_compile.program.slices import sources


class RowsMix(Exception):
    """A call uses an order of rows for something else than to move rows."""


@dataclass(frozen=True, slots=True)
class Moved:
    """An order of rows, or rows that lie so; `sort` is the call that found the order.

    kind: "order" has at each place the number of the row that lies there, of rows that are
    repeated `repeats` times each; "inverse" of each row the place; "rows" are rows that lie so.
    """

    kind: str
    sort: fx.Node
    repeats: int = 1


OWN = None  # rows where they were
Tag = Moved | None
Move = Callable[["RowOrders", fx.Node], Tag]


@dataclass
class RowOrders:
    """What is known of the values of a graph, told node by node in its order."""

    values: Values
    placed: Mapping[fx.Node, Placement]
    tags: dict[fx.Node, Moved] = field(default_factory=dict)

    def moves(self, node: fx.Node) -> bool:
        """Whether `node` moves rows, and gives S(0); raises `RowsMix` if it mixes them.

        Where it does not, the rules of its op say how its result lies.
        """
        try:
            tag = self._move(node)
        except LookupError:
            tags = {self.tags.get(n) for n in tensor_inputs(node) if self.has_rows(n)}
            tag = tags.pop() if tags else OWN
            if tags or (tag and tag.kind != "rows"):
                raise RowsMix from None
            self._keep(node, tag)
            return False
        self._keep(node, tag)
        return True

    def has_rows(self, node: fx.Node) -> bool:
        """Whether the rows of the batch lie along a dimension of a value."""
        return self.placed[node].is_shard

    def _keep(self, node: fx.Node, tag: Tag) -> None:
        if tag:
            self.tags[node] = tag

    def _move(self, node: fx.Node) -> Tag:
        """Return where rows are that `node` moves; raises `LookupError` if it moves none."""
        name = op_name(node)
        move = _grouped if name in GROUPED else _MOVES[node.target]
        return move(self, node)

    def order(self, node: Any, kind: str = "order") -> Moved:
        """Return the order that a value is; raises `LookupError` if it is none."""
        tag = self.tags[node]
        if tag.kind != kind:
            raise LookupError
        return tag


def _sorted(orders: RowOrders, node: fx.Node) -> Tag:
    x: Any = node.args[0]
    _expect(x.meta["val"].dim() == 1 and orders.has_rows(x))
    if x not in orders.tags:
        return Moved("order", node)
    order = orders.order(x)
    _expect(order.repeats == 1 and not argument(node, "descending"))
    return replace(order, kind="inverse")


def _divided(orders: RowOrders, node: fx.Node) -> Tag:
    order, repeats = orders.order(node.args[0]), node.args[1]
    if order.repeats != 1 or not isinstance(repeats, int):
        raise LookupError
    return replace(order, repeats=repeats)


def _viewed(orders: RowOrders, node: fx.Node) -> Tag:
    x: Any = node.args[0]
    _expect(node.meta["val"].shape[:1] == x.meta["val"].shape[:1])
    return orders.order(x)


def _picked(orders: RowOrders, node: fx.Node, data: Any, index: Any) -> Tag:
    """Rows of `data`, each `repeats` times, in the order that `index` says."""
    rows, places = (n.meta["val"].shape[0] for n in (data, index))
    if index not in orders.tags:  # a constant that repeats each row
        _expect(places % rows == 0 and orders.values.repeats(index) == places // rows)
        return orders.tags.get(data)
    tag = orders.tags[index]
    if tag.kind == "inverse":
        _expect(orders.order(data, "rows").sort is tag.sort and rows == places)
        return OWN
    order = orders.order(index)
    if repeats := orders.values.repeats(data):  # a constant: which token each place is of
        _expect(order.repeats == 1 and rows == places)
        return replace(order, repeats=repeats)
    _expect(orders.has_rows(data) and data not in orders.tags)
    _expect(rows * order.repeats == places)
    return Moved("rows", order.sort)


def _indexed(orders: RowOrders, node: fx.Node) -> Tag:
    indices: Any = node.args[1]
    _expect(len(indices) == 1 and indices[0].meta["val"].dim() == 1)
    return _picked(orders, node, node.args[0], indices[0])


def _gathered(orders: RowOrders, node: fx.Node) -> Tag:
    data, dim, index = cast(tuple[Any, ...], node.args[:3])
    _expect(dim == 0 or data.meta["val"].dim() == 1)
    return _picked(orders, node, data, index)


def _placed_back(orders: RowOrders, node: fx.Node) -> Tag:
    base, dim, index, rows = cast(tuple[Any, ...], node.args[:4])
    _expect(dim == 0)
    return _back(orders, base, index, rows)


def _back(orders: RowOrders, base: Any, index: Any, rows: Any) -> Tag:
    """Rows written, or added, to where they came from, as their order or a constant says."""
    _expect(base not in orders.tags)
    if index in orders.tags or rows in orders.tags:
        _expect(orders.order(rows, "rows").sort is orders.order(index).sort)
    else:
        whole, places = (n.meta["val"].shape[0] for n in (base, index))
        _expect(orders.has_rows(rows) and orders.values.repeats(index) == places // whole)
    return OWN


def _put(orders: RowOrders, node: fx.Node) -> Tag:
    base, (index, *more), values = cast(tuple[Any, ...], node.args[:3])
    _expect(not more)
    if values in orders.tags:
        return _back(orders, base, index, values)
    order = orders.order(index)
    is_count = orders.values.repeats(values) == 1 and order.repeats == 1
    _expect(is_count and True not in node.args[3:])
    return replace(order, kind="inverse")


def _grouped(orders: RowOrders, node: fx.Node) -> Tag:
    """The matrices of groups whose ends were counted in what the rows were sorted by."""
    rows, offsets = node.args[0], argument(node, "offs")
    order = orders.order(rows, "rows")
    key = order.sort.args[0]
    _expect(isinstance(offsets, fx.Node) and orders.placed[offsets] == P)
    _expect(key in sources([offsets]))
    return order


def _expect(holds: bool) -> None:
    if not holds:
        raise LookupError


_MOVES: dict[Any, Move] = {
    aten.argsort.default: _sorted,
    aten.argsort.stable: _sorted,
    aten.floor_divide.default: _divided,
    aten.index.Tensor: _indexed,
    aten.index_select.default: _gathered,
    aten.gather.default: _gathered,
    aten.index_put.default: _put,
    **dict.fromkeys(
        (
            *(aten.index_add.default, aten.index_copy.default, aten.scatter_add.default),
            aten.scatter.src,
        ),
        _placed_back,
    ),
    **dict.fromkeys(
        (
            *(aten.unsqueeze.default, aten.expand.default, aten.reshape.default),
            *(aten.to.dtype, aten.clone.default, aten.contiguous.default),
        ),
        _viewed,
    ),
}

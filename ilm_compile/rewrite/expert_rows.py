"""Name the sort of rows by their experts, so that it can be placed.

A mixture of experts written with argsort and indexing moves rows by integers that say nothing of
what they mean. Where every use of such an order is one of the known ones, they become the calls of
`ilm_compile.program.expert_rows`; where any is not, nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ilm_compile.ops.call import aten
from ilm_compile.program.arguments import argument
from ilm_compile.program.expert_rows import expert_order, sort_rows, unsort_rows
from ilm_compile.program.input_graph import reached
from ilm_compile.program.program import Program

Call = tuple[Any, tuple[Any, ...]]
Found = dict[fx.Node, Call]  # a node of the graph, and the call that says what it is


def name_expert_rows(program: Program) -> None:
    """Rewrite every order of rows by experts and what uses it."""
    orders = program.graph.find_nodes(op="call_function", target=aten.argsort.default)
    uses = {order: _uses(order) for order in orders}
    for order, found in uses.items():
        if not _comes_back(order, uses):
            continue
        for node, (target, args) in [(order, (expert_order, order.args[:1])), *found.items()]:
            node.target, node.args, node.kwargs = target, args, {}
    program.graph.eliminate_dead_code()


def _comes_back(order: fx.Node, uses: dict[fx.Node, Found]) -> bool:
    """Whether rows of this order are put back, and meet none of another order before."""
    found = uses[order]
    others = {node for each, calls in uses.items() if each is not order for node in calls}
    rows: list[Any] = [args[0] for target, args in found.values() if target is unsort_rows]
    before = reached(rows, lambda n: () if n in found else n.all_input_nodes)
    return bool(rows) and others.isdisjoint(before)


def _uses(order: fx.Node) -> Found:
    """Return what each use of `order` is; nothing if one is unknown."""
    x, descending = order.args[0], argument(order, "descending")
    if len(x.meta["val"].shape) != 1 or x.meta["val"].is_floating_point() or descending:  # type: ignore[union-attr]
        return {}
    found: Found = {}
    for user in order.users:
        use = _USES.get(user.target)
        if use is None or not use(order, user, found):
            return {}
    return found


def _picked(order: fx.Node, index: fx.Node, repeats: int, found: Found) -> bool:
    """Everyone who uses `index` picks rows of a value by it."""
    rows = order.meta["val"].shape[0] // repeats
    for user in index.users:
        if user.target is not aten.index.Tensor or list(user.args[1]) != [index]:  # type: ignore[arg-type]
            return False
        if user.args[0].meta["val"].shape[0] != rows:  # type: ignore[union-attr]
            return False
        found[user] = sort_rows, (user.args[0], order, repeats)
    return True


def _rows(order: fx.Node, user: fx.Node, found: Found) -> bool:
    """``x[order]``."""
    is_index = list(user.args[1]) == [order]  # type: ignore[arg-type]
    if not is_index or user.args[0].meta["val"].shape[0] != order.meta["val"].shape[0]:  # type: ignore[union-attr]
        return False
    found[user] = sort_rows, (user.args[0], order, 1)
    return True


def _gathered(order: fx.Node, user: fx.Node, found: Found) -> bool:
    """``x.gather(0, order)`` of a vector: what `torch.sort` returns beside the order."""
    x, _, index = user.args[:3]
    if index is not order or x.meta["val"].shape != order.meta["val"].shape:  # type: ignore[union-attr]
        return False
    found[user] = sort_rows, (x, order, 1)
    return True


def _of_tokens(order: fx.Node, user: fx.Node, found: Found) -> bool:
    """``x[order // k]``: rows of tokens, each of which has k experts."""
    repeats = user.args[1]
    if user.args[0] is not order or not isinstance(repeats, int):
        return False
    return order.meta["val"].shape[0] % repeats == 0 and _picked(order, user, repeats, found)


def _inverse(order: fx.Node, user: fx.Node, found: Found) -> bool:
    """``x[inverse]`` with ``inverse[order] = arange(n)``, or with ``inverse = order.argsort()``."""
    for index in user.users:
        if index.target is not aten.index.Tensor or list(index.args[1]) != [user]:  # type: ignore[arg-type]
            return False
        if index.args[0].meta["val"].shape[0] != order.meta["val"].shape[0]:  # type: ignore[union-attr]
            return False
        found[index] = unsort_rows, (index.args[0], order)
    return True


def _written(order: fx.Node, user: fx.Node, found: Found) -> bool:
    _, indices, values = user.args[:3]
    count = order.meta["val"].shape[0]
    is_arange = getattr(values, "target", None) is aten.arange.default and values.args == (count,)  # type: ignore[union-attr]
    return list(indices) == [order] and is_arange and _inverse(order, user, found)  # type: ignore[arg-type]


def _sorted_again(order: fx.Node, user: fx.Node, found: Found) -> bool:
    ascends = not argument(user, "descending")
    return user.args[0] is order and ascends and _inverse(order, user, found)


def _shape_only(order: fx.Node, user: fx.Node, found: Found) -> bool:
    """An empty value of its shape, which `_written` fills."""
    return all(u.target is aten.index_put.default and u.args[0] is user for u in user.users)


_USES: dict[Any, Callable[[fx.Node, fx.Node, Found], bool]] = {
    aten.index.Tensor: _rows,
    aten.gather.default: _gathered,
    aten.floor_divide.default: _of_tokens,
    aten.index_put.default: _written,
    aten.argsort.default: _sorted_again,
    aten.empty_like.default: _shape_only,
    aten.new_empty.default: _shape_only,
}

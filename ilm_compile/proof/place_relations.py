"""Ops that pick or name places along a dimension, which must move with its size."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ilm_compile.proof.dims import View, op_name, pin, same

# Through these places stay places.
MOVED = {
    *("redistribute", "slice", "reshape", "contiguous", "clone", "detach", "to", "unsqueeze"),
    *("expand", "transpose", "permute", "select", "squeeze"),
}


def places_of(node: Any) -> tuple[fx.Node, int, int] | None:
    """Return (value, its dimension, divisor) if `node` holds places along that dimension, divided.

    None if it is not known to hold any.
    """
    by = 1
    while isinstance(node, fx.Node):
        name = op_name(node)
        if name in ("argsort", "arange"):
            dim: Any = node.args[1] if name == "argsort" and len(node.args) > 1 else -1
            return (node, int(dim), by) if name != "arange" or _is_plain(node) else None
        if name == "getitem" and node.args[1] == 1 and op_name(node.args[0]) in ("topk", "sort"):  # type: ignore[arg-type]
            source: Any = node.args[0]
            at = 2 if op_name(source) == "topk" else 1
            dim = source.args[at] if len(source.args) > at else -1
            return source.args[0], int(dim), by
        if name == "floor_divide" and isinstance(node.args[1], int):
            by *= node.args[1]
        elif name == "index_put":  # the inverse of a permutation
            node = node.args[2]
            continue
        elif name not in MOVED and not (name == "add" and node.args[1] == 0):
            return None
        node = node.args[0]
    return None


def _is_plain(node: fx.Node) -> bool:
    return len(node.args) == 1 or bool(node.args[0] == 0 and len(node.args) == 2)


def _picks(view: View, dim: int, index: Any) -> None:
    """`index` names places along `dim`: they must stay within it."""
    classes, found = view.classes, places_of(index)
    if found is not None:
        node, at, by = found
        along = view.dims[node][0][at]
        if classes.sizes[along] == by * classes.sizes[dim]:
            if by == 1:
                classes.tie(along, dim)
            else:
                several = classes.add([by], [by])
                classes.pin(several)
                classes.products.append(([along], [dim, *several]))
            return
    classes.pin([dim])


def ordered(view: View) -> None:
    """Numbers are put in order; among scores the best are chosen, out of as many as there are."""
    x = view.inputs[0]
    at = 2 if op_name(view.node) == "topk" else 1
    dim = view.argument(at, "dim", -1) % len(x)
    scores = view.node.args[0].meta["val"].is_floating_point()  # type: ignore[union-attr]
    for result in view.results:
        for index, (a, b) in enumerate(zip(x, result, strict=True)):
            if index == dim and scores:
                view.classes.pin([a, b])
            else:
                view.classes.tie(a, b)


def index_put(view: View) -> None:
    x, index, values = view.inputs
    (given,) = view.argument(1, "indices")
    view.classes.tie_all(x, view.out)
    view.classes.tie_all(index, values)
    view.classes.tie_all(x[1:], values[len(index) :])
    _picks(view, x[0], given)


def histogram(view: View) -> None:
    view.classes.pin(view.out)


def gather(view: View) -> None:
    x, index = view.inputs[:2]
    dim = view.argument(1, "dim") % len(x)
    view.classes.tie_all(index, view.out)
    _picks(view, x[dim], view.argument(2, "index"))
    for at, (a, b) in enumerate(zip(x, index, strict=True)):
        if at == dim:
            continue
        if view.classes.sizes[a] == view.classes.sizes[b]:
            view.classes.tie(a, b)
        else:
            view.classes.pin([a, b])


def indexed(view: View) -> None:
    """Indices side by side: their dimensions stand for those that they pick from."""
    indices = view.argument(1, "indices")
    given = [at for at, index in enumerate(indices) if index is not None]
    x, *found = view.inputs
    first, last = given[0], given[-1]
    is_plain = given == list(range(first, last + 1)) and len(found) == len(given)
    if not is_plain or any(indices[at].meta["val"].dtype == torch.bool for at in given):
        return pin(view)
    rest = x[last + 1 :]
    middle = view.out[first : len(view.out) - len(rest)]
    view.classes.tie_all(x[:first], view.out[:first])
    view.classes.tie_all(rest, view.out)
    for at, index in zip(given, found, strict=True):
        view.classes.tie_all(index, middle)
        _picks(view, x[at], indices[at])
    return None


def compared(view: View) -> None:
    """A number that places are compared with is a place itself."""
    same(view)
    bound, found = view.node.args[1], places_of(view.node.args[0])
    if isinstance(bound, int) and found is not None and found[2] == 1:
        dim = view.dims[found[0]][0][found[1]]
        if 0 < bound < view.classes.sizes[dim]:
            view.classes.positions.append((dim, bound))

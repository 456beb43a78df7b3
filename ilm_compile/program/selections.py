"""Ops that return values and where they were found, as two ops with one result each.

``topk``, ``sort`` and ``max(dim)`` become a search for indices, through which no gradient flows,
and a gather of the values, through which one does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.arguments import named

aten = torch.ops.aten
Emit = Callable[..., fx.Node]


def lower_topk(emit: Emit, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The k largest or smallest, in order; among equals any may be taken, as torch does."""
    x, k, dim, largest = (
        named(node.target, args, kwargs, name) for name in ("self", "k", "dim", "largest")
    )
    order = emit(node, aten.argsort.default, (x, dim, largest), val=_indices(x.meta["val"]))
    indices = emit(node, aten.slice.Tensor, (order, dim, 0, k), val=node.meta["val"][1])
    return [_gather(emit, node, x, dim, indices), indices]


def lower_sort(emit: Emit, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """All values in order."""
    x, dim, descending = (
        named(node.target, args, kwargs, name) for name in ("self", "dim", "descending")
    )
    order = (x, dim, descending)
    indices = emit(node, aten.argsort.default, order, val=node.meta["val"][1])
    return [_gather(emit, node, x, dim, indices), indices]


def lower_max(emit: Emit, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The largest (or smallest) along one dimension."""
    x, dim, keepdim = (
        named(node.target, args, kwargs, name) for name in ("self", "dim", "keepdim")
    )
    find = aten.argmax.default if node.target is aten.max.dim else aten.argmin.default
    values, places = node.meta["val"]
    whole = places if keepdim else places.unsqueeze(dim)
    indices = emit(node, find, (x, dim, True), val=whole)
    found = emit(node, aten.gather.default, (x, dim, indices), val=values.new_empty(whole.shape))
    if keepdim:
        return [found, indices]
    pairs = ((found, values), (indices, places))
    return [emit(node, aten.squeeze.dim, (kept, dim), val=val) for kept, val in pairs]


def _indices(val: Tensor) -> Tensor:
    return val.new_empty(val.shape, dtype=torch.int64)


def _gather(emit: Emit, node: fx.Node, x: fx.Node, dim: int, indices: fx.Node) -> fx.Node:
    return emit(node, aten.gather.default, (x, dim, indices), val=node.meta["val"][0])


SELECTIONS = {
    aten.topk.default: lower_topk,
    aten.sort.default: lower_sort,
    aten.max.dim: lower_max,
    aten.min.dim: lower_max,
}

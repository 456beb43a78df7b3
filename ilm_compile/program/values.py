"""What a node holds: one tensor, or for an op with several results a tuple of them.

A tuple is a value of its own, of one placement, which holds for each of its tensors. It goes no
further than `operator.getitem`, whose nodes stand for the single results, in the region and stage
of the op: no tuple is moved between ranks or stages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx


def is_tuple(node: fx.Node) -> bool:
    """Whether `node` is a call with several results."""
    return isinstance(node.meta.get("val"), tuple)


def tensors_of(value: object) -> tuple[Tensor, ...]:
    """Return the tensors in a node's ``val``: none, one or several."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(item for item in values if isinstance(item, Tensor))


def is_real(node: fx.Node) -> bool:
    """Whether a node holds floating-point numbers, in one of its tensors at least."""
    return any(value.is_floating_point() for value in tensors_of(node.meta.get("val")))


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Return `function` of a tensor, or the tuple of it for each of several."""
    return tuple(map(function, value)) if isinstance(value, (list, tuple)) else function(value)


def shapes_of(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    """Return the shape of each result of `node`."""
    return tuple(tuple(value.shape) for value in tensors_of(node.meta["val"]))


STANDS_FOR = "stands_for"  # in a node's meta: the name of the node whose value it took over


def take_name(new: fx.Node, old: fx.Node) -> None:
    """Note that `new` has the value of `old`, which it replaces."""
    new.meta[STANDS_FOR] = name_of(old)


def name_of(node: fx.Node) -> str:
    """Return the name under which the traced graph knows the value of `node`, if it does."""
    return str(node.meta.get(STANDS_FOR, node.name))


def without_data(value: Any) -> Any:
    """Return `value`, a tensor or several, as meta tensors of the same shape, strides and dtype."""
    return map_tensors(
        lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"), value
    )


def run_without_data(node: fx.Node) -> Any:
    """Return what a call gives without data, from the values that its inputs are said to have."""
    args, kwargs = fx.node.map_arg(
        (node.args, node.kwargs), lambda source: without_data(source.meta["val"])
    )
    return node.target(*args, **kwargs)  # type: ignore[operator]

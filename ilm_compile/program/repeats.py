"""Ops that repeat values, as views with explicit sizes: a new dimension, expanded and merged.

What is repeated can then be sharded by the rules of views, heads repeated for their queries too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
Emit = Callable[..., fx.Node]


def lower_repeat_interleave(
    emit: Emit, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Each entry of one dimension, several times in a row."""
    x, count = args[0], args[1]
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    shape = list(x.meta["val"].shape) if dim is not None else [x.meta["val"].numel()]
    dim = dim % len(shape) if dim is not None else 0
    one = [*shape[: dim + 1], 1, *shape[dim + 1 :]]
    many = [*shape[: dim + 1], count, *shape[dim + 1 :]]
    return _steps(emit, node, x, one, many)


def lower_repeat(emit: Emit, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The whole of each dimension, several times over; new dimensions come first."""
    x, counts = args[0], list(args[1])
    shape = list(x.meta["val"].shape)
    new = len(counts) - len(shape)
    if new < 0:  # tile may name the last dimensions only
        counts, new = [1] * -new + counts, 0
    pairs = list(zip(counts, [1] * new + shape, strict=True))
    one = [n for count, size in pairs for n in ((1, size) if count > 1 else (size,))]
    many = [n for count, size in pairs for n in ((count, size) if count > 1 else (size,))]
    return _steps(emit, node, x, one, many)


def _steps(
    emit: Emit, node: fx.Node, x: fx.Node, one: Sequence[int], many: Sequence[int]
) -> fx.Node:
    """Emit x, viewed as `one`, expanded to `many` and merged into the shape of `node`."""
    steps = (
        (aten.reshape.default, list(one)),
        (aten.expand.default, list(many)),
        (aten.reshape.default, list(node.meta["val"].shape)),
    )
    for target, sizes in steps:
        if list(x.meta["val"].shape) != sizes:
            x = emit(node, target, (x, sizes), val=x.meta["val"].new_empty(sizes))
    return x


REPEATS = {
    aten.repeat_interleave.self_int: lower_repeat_interleave,
    aten.repeat.default: lower_repeat,
    aten.tile.default: lower_repeat,
}

"""Constants of a traced graph, compared between two sizes of the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.attributes import tensor_at

aten = torch.ops.aten
MAX_ELEMENTS = 2**26  # of a constant that is computed to be looked at
Number = int | float
# Of their first input they take dtype and device alone, and are the same everywhere.
CREATED = {
    *(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default),
    *(aten.new_full.default, aten.zeros_like.default, aten.empty_like.default),
}


def numbers(node: fx.Node) -> list[Number]:
    """Return the numbers among the arguments of a call, in order; booleans are none."""
    found: list[Number] = []

    def visit(value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            found.append(value)
        return value

    fx.node.map_aggregate((node.args, dict(node.kwargs)), visit)
    return found


def same(part: fx.Node, whole: fx.Node) -> bool:
    """Whether two get_attr nodes stand for the same value: a variable, or equal constants."""
    ours, theirs = _attribute(part), _attribute(whole)
    if ours.is_meta or theirs.is_meta:
        return ours.is_meta == theirs.is_meta and ours.shape == theirs.shape
    return torch.equal(ours, theirs)


def same_call(part: fx.Node, whole: fx.Node) -> bool:
    """Whether two calls without inputs make the same value, as far as their sizes agree."""
    if part.meta["val"].shape != whole.meta["val"].shape:
        return True
    return (part.args, part.kwargs) == (whole.args, whole.kwargs)


def _attribute(node: fx.Node) -> Tensor:
    assert node.graph.owning_module is not None
    return tensor_at(node.graph.owning_module, str(node.target))


class Values:
    """The values of nodes that depend on sizes alone, computed when they are asked for."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._known: dict[fx.Node, Tensor | None] = {}

    def is_uniform(self, node: fx.Node, dim: int) -> bool:
        """Whether the constant is the same all along one dimension."""
        if node.target in CREATED:
            return True
        value = self._value(node)
        return value is not None and bool((value == value.narrow(dim, 0, 1)).all())

    def is_zero(self, node: fx.Node) -> bool:
        """Whether the constant is 0."""
        value = self._value(node)
        return value is not None and not value.any()

    def counts_along(self, node: fx.Node) -> int | None:
        """Return the dimension along which the constant is 0, 1, 2, ..., the others being 1."""
        value = self._value(node)
        if value is None or value.dim() == 0 or value.numel() != max(value.shape):
            return None
        is_count = torch.equal(value.flatten(), torch.arange(value.numel()))
        return value.shape.index(value.numel()) if is_count else None

    def repeats(self, node: fx.Node) -> int | None:
        """Return n if the constant is 0, 1, 2, ... along dimension 0, each n times in a row."""
        value = self._value(node)
        if value is None or value.dim() == 0 or value.is_floating_point() or not value.numel():
            return None
        first = value.flatten(1)[:, 0] if value.dim() > 1 else value
        times = int((first == first[0]).sum())
        counted = torch.arange(len(first)).div(times, rounding_mode="floor")
        same = (value == counted.view(-1, *(1,) * (value.dim() - 1))).all()
        return times if bool(same) else None

    def _value(self, node: fx.Node) -> Tensor | None:
        if node not in self._known:
            self._known[node] = self._compute(node)
        return self._known[node]

    def _compute(self, node: fx.Node) -> Tensor | None:
        if node.op == "get_attr":
            value = _attribute(node)
            return None if value.is_meta else value
        if node.op != "call_function" or node.meta["val"].numel() > MAX_ELEMENTS:
            return None
        if any(self._value(n) is None for n in node.all_input_nodes):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        result: Any = node.target(*args, **kwargs)  # type: ignore[operator]
        return result if isinstance(result, Tensor) else None

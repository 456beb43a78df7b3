"""Dimensions of values, tied into classes of one size, and a call as the relations see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ilm_compile.ops.spec import whole_target

Dims = list[int]  # a dimension of a value each, as a number that `Classes` knows
END = 2**62  # a slice bound above it means the end


@dataclass
class Classes:
    """Dimensions by number, tied into classes.

    sizes: of each dimension, global ones. locals: what a rank holds, where it is less. products:
    pairs of lists of dimensions whose sizes have equal products. positions: places along a
    dimension, other than its ends, that something names. scaled: dimensions whose class has sizes
    that are multiples of each other, and must stay so.
    """

    sizes: list[int] = field(default_factory=list)
    locals: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    products: list[tuple[Dims, Dims]] = field(default_factory=list)
    positions: list[tuple[int, int]] = field(default_factory=list)
    scaled: list[int] = field(default_factory=list)

    def add(self, shape: Sequence[int], local: Sequence[int]) -> Dims:
        """Return new dimensions of these sizes."""
        first = len(self.sizes)
        self.sizes += shape
        self.locals += local
        self.parents += range(first, first + len(shape))
        return list(range(first, first + len(shape)))

    def find(self, dim: int) -> int:
        """Return the class of a dimension."""
        while self.parents[dim] != dim:
            self.parents[dim] = self.parents[self.parents[dim]]
            dim = self.parents[dim]
        return dim

    def tie(self, a: int, b: int) -> None:
        """Make two dimensions of one size one class; a padded one keeps its padding."""
        if self.sizes[a] == 1 or self.sizes[b] == 1:  # one is broadcast
            return
        self.parents[self.find(a)] = self.find(b)

    def scale(self, a: int, b: int) -> None:
        """Make one class of dimensions of which one is a multiple of the other."""
        if self.sizes[a] != self.sizes[b]:
            self.scaled += (a, b)
        self.tie(a, b)

    def scale_all(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Likewise, dimension by dimension, from the last one on."""
        for a, b in zip(reversed(left), reversed(right), strict=False):
            self.scale(a, b)

    def tie_all(self, left: Sequence[int], right: Sequence[int]) -> None:
        """Tie dimension by dimension, from the last one on."""
        for a, b in zip(reversed(left), reversed(right), strict=False):
            self.tie(a, b)

    def pin(self, dims: Sequence[int]) -> None:
        """Let dimensions keep their sizes."""
        self.pinned += dims


@dataclass(frozen=True, slots=True)
class View:
    """A call as the table's rows see it: its dimensions, inputs in order, results in order."""

    node: fx.Node
    inputs: list[Dims]
    results: list[Dims]
    classes: Classes
    dims: Mapping[fx.Node, list[Dims]]

    @property
    def out(self) -> Dims:
        """The dimensions of the first result."""
        return self.results[0]

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Return the argument given by position or by name."""
        if len(self.node.args) > index:
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def is_split(self, dim: int) -> bool:
        """Whether the ranks hold less of a dimension of the first input than there is."""
        number = self.inputs[0][dim]
        return self.classes.locals[number] < self.classes.sizes[number]

    def name_position(self, dim: int, position: int) -> None:
        """Note a place along dimension `dim` of the first input; local ones are made global."""
        number = self.inputs[0][dim]
        position *= self.classes.sizes[number] // max(1, self.classes.locals[number])
        length = self.classes.sizes[number]
        position = position + length if position < 0 else position
        if 0 < position < length:
            self.classes.positions.append((number, position))


Relation = Callable[[View], None]


def op_name(node: fx.Node, *, whole: bool = False) -> str:
    """Return an op's name without overload, or that of a function of ours.

    whole: of a sharded form the name of the op that it stands for.
    """
    target = whole_target(node) if whole else node.target
    schema = getattr(target, "_schema", None)
    name = schema.name if schema else getattr(target, "__name__", str(target))
    return str(name).removeprefix("aten::").removesuffix("_") if schema else str(name)


def pin(view: View) -> None:
    for dims in [*view.inputs, *view.results]:
        view.classes.pin(dims)


def same(view: View) -> None:
    """All aligned at the last dimension."""
    for result in view.results:
        for dims in view.inputs:
            view.classes.tie_all(dims, result)

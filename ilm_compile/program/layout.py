"""Layouts: where a value lies on every axis of the mesh that graphs know.

An axis cuts what the axes before it in `AXES` have left: the layout {tp: S(0), cp: S(0)} gives each
tp rank a contiguous part of dimension 0, and each cp rank a part of that. Axes on which a value is
invariant are not written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from ilm_compile.program.placement import I, Placement, join_shards, split_shards
from ilm_compile.program.values import shapes_of

# In the order in which they cut. A weight axis shards parameters: they are I or S on it. A token
# axis shards activations: parameters are R on it, each rank holds a part of their gradients, and
# the storage adds the parts up once a step. Expert weights can be S on EXPERT_AXIS, a token axis.
WEIGHT_AXES = ("tp",)
EXPERT_AXIS = "ep"
TOKEN_AXES = (EXPERT_AXIS, "cp")
AXES = (*WEIGHT_AXES, *TOKEN_AXES)
Sizes = Mapping[str, int]  # ranks by axis


@dataclass(frozen=True, slots=True)
class Place:
    """One rank's place on the axes: their sizes, and its number on each."""

    sizes: Sizes = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{axis} {self.ranks[axis]} of {n}" for axis, n in self.sizes.items())


@dataclass(frozen=True, slots=True)
class Layout:
    """The placements of a value by axis; `str()` and `parse` are inverse to each other."""

    placed: tuple[tuple[str, Placement], ...] = ()

    @classmethod
    def of(cls, placements: Mapping[str, Placement]) -> Layout:
        """Return the layout with these placements."""
        return cls(tuple((a, placements[a]) for a in AXES if placements.get(a, I) != I))

    @staticmethod
    def parse(text: str) -> Layout:
        """Return the layout written as `text`, for example ``"tp: S(0); cp: R"``."""
        parts = (part.split(":") for part in text.split("; ") if text != "I")
        return Layout.of({axis: Placement.parse(place.strip()) for axis, place in parts})

    def __str__(self) -> str:
        return "; ".join(f"{axis}: {placement}" for axis, placement in self.placed) or "I"

    def on(self, axis: str) -> Placement:
        """Return the placement on one axis."""
        return dict(self.placed).get(axis, I)

    def with_placement(self, axis: str, placement: Placement) -> Layout:
        """Return this layout with another placement on one axis."""
        return Layout.of({**dict(self.placed), axis: placement})

    @property
    def is_partial(self) -> bool:
        """Whether the ranks of some axis hold parts that are still to be added up."""
        return any(placement.kind == "P" for _, placement in self.placed)

    @property
    def is_shard(self) -> bool:
        """Whether some axis cuts the value."""
        return any(placement.is_shard for _, placement in self.placed)

    @property
    def is_routed(self) -> bool:
        """Whether some axis holds rows of experts, in an order of its own: none is the whole's."""
        return any(placement.kind in "TCDE" for _, placement in self.placed)

    def shards(self, sizes: Sizes) -> list[tuple[str, Placement]]:
        """Return the axes that cut the value, outermost first."""
        return [(a, p) for a, p in self.placed if p.is_shard and sizes.get(a, 1) > 1]

    def _cuts(self, sizes: Sizes) -> list[tuple[str, Placement]]:
        return [(a, p) for a, p in self.placed if p.cuts and sizes.get(a, 1) > 1]

    def local_shape(self, shape: Sequence[int], sizes: Sizes) -> tuple[int, ...]:
        """Return the shape that one rank holds of a value of global `shape`."""
        for axis, placement in self._cuts(sizes):
            shape = placement.local_shape(shape, sizes[axis])
        return tuple(shape)

    def global_shape(self, shape: Sequence[int], sizes: Sizes) -> tuple[int, ...]:
        """Return the global shape of a value whose rank-local shape is `shape`."""
        for axis, placement in self._cuts(sizes):
            shape = placement.global_shape(shape, sizes[axis])
        return tuple(shape)

    def parts_before(self, axis: str, sizes: Sizes) -> int:
        """Return into how many parts other axes cut a dimension before `axis` does."""
        dim, parts = self.on(axis).dim, 1
        for other, placement in self.shards(sizes):
            if other == axis:
                break
            parts *= sizes[other] if placement.dim == dim else 1
        return parts

    def cut(self, full: Tensor, place: Place) -> Tensor:
        """Return the part of `full` that the rank at `place` holds."""
        for axis, placement in self.shards(place.sizes):
            full = split_shards(full, placement, place.sizes[axis])[place.ranks[axis]]
        return full

    def alone(self, part: Tensor, place: Place) -> Tensor:
        """Return a full tensor with the `part` of the rank at `place`, zero elsewhere."""
        for axis, placement in reversed(self.shards(place.sizes)):
            parts = [torch.zeros_like(part) for _ in range(place.sizes[axis])]
            parts[place.ranks[axis]] = part
            part = join_shards(parts, placement)
        return part

    def text(self, axes: Iterable[str]) -> str:
        """Return the placement alone on a mesh of one axis, else that of each axis by name."""
        names = list(axes)
        return str(self.on(names[0])) if len(names) == 1 else str(self)


def sharded_over(axis: str) -> str:
    """Return the fact that a program was sharded over `axis` (see `Program.facts`)."""
    return f"sharded over {axis}"


INVARIANT = Layout()


@dataclass(frozen=True, slots=True)
class MeshAxis:
    """One axis, as the rules see a program on it: local to the axes that cut before, whole on it.

    sizes: the ranks of this axis and of those that cut after it.
    """

    name: str
    sizes: Sizes

    @classmethod
    def of(cls, name: str, sizes: Sizes) -> MeshAxis:
        """Return axis `name` of a mesh with these sizes."""
        return cls(name, {axis: sizes[axis] for axis in AXES[AXES.index(name) :] if axis in sizes})

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.sizes[self.name]

    def placement(self, node: fx.Node) -> Placement:
        """Return the placement of a node's value on this axis; I where none was set."""
        return layout_of(node).on(self.name)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a node's value on this axis; of several results, the first one's."""
        return self.shapes(node)[0]

    def shapes(self, node: fx.Node) -> list[tuple[int, ...]]:
        """Return the shapes of all results of a node."""
        layout = layout_of(node)
        return [layout.global_shape(shape, self.sizes) for shape in shapes_of(node)]


def layout_of(node: fx.Node) -> Layout:
    """Return the layout of a node's value; invariant where none was set."""
    found: Layout = node.meta.get("layout", INVARIANT)
    return found

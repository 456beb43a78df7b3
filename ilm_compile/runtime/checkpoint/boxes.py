"""Which part of the user's full tensor a rank's own tensor is: a list of equal boxes.

Everything that a plan does to a tensor at rest is cutting (by the axes of graphs along their
placements, segment by segment; then dp along the rows that are left) and padding (rows at the end
that the user's tensor does not have). Boxes say it in the coordinates of the user's tensor, which
all plans share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from torch import Tensor

from ilm_compile.program.layout import Place
from ilm_compile.program.placement import Placement
from ilm_compile.program.program import Variable
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.shard import Shard, stored_part

Coordinates = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Box:
    """A block of the user's full tensor: where it starts, and its size, both by dimension."""

    start: Coordinates
    sizes: Coordinates

    @property
    def stop(self) -> Coordinates:
        """One past the last element, by dimension."""
        return tuple(a + n for a, n in zip(self.start, self.sizes, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements; 1 for the box of a scalar."""
        return prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """What both have in common, None if nothing."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))

    def inside(self, outer: Box) -> Box:
        """This box in coordinates that start where `outer` does."""
        return Box(tuple(a - b for a, b in zip(self.start, outer.start, strict=True)), self.sizes)

    def after(self, outer: Box) -> Box:
        """The inverse of `inside`."""
        return Box(tuple(a + b for a, b in zip(self.start, outer.start, strict=True)), self.sizes)

    def of(self, tensor: Tensor) -> Tensor:
        """The view of `tensor` that this box cuts out."""
        for dim, (start, size) in enumerate(zip(self.start, self.sizes, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor


@dataclass(frozen=True, slots=True)
class Held:
    """`own`, in this rank's tensor, holds the elements `full` of the user's."""

    own: Box
    full: Box


def whole(shape: Sequence[int]) -> Box:
    """The box that is the whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def held_boxes(variable: Variable, place: Place, *, stored: Box | None = None) -> list[Held]:
    """The boxes of `variable` on the rank at `place`; none where it holds nothing.

    stored: what FSDP leaves here of the rank's tensor, None for all.
    """
    shape = variable.shape
    if not shape:
        return [Held(Box((), ()), Box((), ()))]
    own_limits = stored or whole(variable.layout.local_shape(shape, place.sizes))
    user_limits = whole(variable.user_shape)
    found = []
    for own, full in _cut_boxes(variable, place):
        kept = own.intersect(own_limits)
        if kept is None:
            continue
        shifted = kept.inside(own).after(full).intersect(user_limits)
        if shifted is not None:
            found.append(Held(shifted.inside(full).after(own).inside(own_limits), shifted))
    return found


def boxes_of(shard: Shard, mesh: Mesh) -> list[Held]:
    """The boxes of what this rank holds of one parameter or buffer."""
    if not shard.is_dp_sharded:
        return held_boxes(shard.variable, mesh.place)
    part = stored_part(shard.variable, mesh)
    start = _at(part.dim, part.start, len(part.shape))
    sizes = (*part.shape[: part.dim], part.size, *part.shape[part.dim + 1 :])
    return held_boxes(shard.variable, mesh.place, stored=Box(start, sizes))


def _cut_boxes(variable: Variable, place: Place) -> list[tuple[Box, Box]]:
    """The boxes on the rank at `place`, and the same in the full tensor, axis after axis."""
    shape: Sequence[int] = variable.shape
    found = [(whole(shape), whole(shape))]
    for axis, placement in variable.layout.shards(place.sizes):
        rank, size = place.ranks[axis], place.sizes[axis]
        pieces = _segment_boxes(placement, shape, rank, size)
        found = [
            (both.inside(before).after(own), both.inside(held).after(full))
            for own, before in pieces
            for held, full in found
            if (both := before.intersect(held)) is not None
        ]
        shape = placement.local_shape(shape, size)
    return found


def _segment_boxes(
    placement: Placement, shape: Sequence[int], rank: int, size: int
) -> list[tuple[Box, Box]]:
    """For each segment of the cut dimension, the box on this rank and in what is cut."""
    dim = placement.dim
    segments = placement.segments or (shape[dim],)
    starts = [0, *accumulate(segments)]
    boxes = []
    for segment, start in zip(segments, starts, strict=False):
        part = segment // size
        sizes = (*shape[:dim], part, *shape[dim + 1 :])
        own = _at(dim, start // size, len(shape))
        full = _at(dim, start + rank * part, len(shape))
        boxes.append((Box(own, sizes), Box(full, sizes)))
    return boxes


def _at(dim: int, start: int, ndim: int) -> Coordinates:
    return tuple(start if d == dim else 0 for d in range(ndim))

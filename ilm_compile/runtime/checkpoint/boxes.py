"""Which part of the user's full tensor a rank's own tensor is: a list of equal boxes.

Everything that a plan does to a tensor at rest is cutting (tp along the placement, segment by
segment; then dp along the rows that are left) and padding (rows at the end that the user's tensor
does not have). Boxes say it in the coordinates of the user's tensor, which all plans share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from torch import Tensor

from ilm_compile.program.program import Variable
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.shard import Shard

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


def held_boxes(
    variable: Variable, *, tp: tuple[int, int], rows: tuple[int, int] | None = None
) -> list[Held]:
    """The boxes of `variable` on tp rank ``tp[0]`` of ``tp[1]``; none where it holds nothing.

    rows: start and number of the rows of the tp rank's tensor that dp leaves here, None for all.
    """
    placement, shape = variable.placement, variable.shape
    if not shape:
        return [Held(Box((), ()), Box((), ()))]
    own_limits = whole(placement.local_shape(shape, tp[1]))
    if rows is not None:
        own_limits = Box((rows[0], *own_limits.start[1:]), (rows[1], *own_limits.sizes[1:]))
    user_limits = whole(variable.user_shape)
    found = []
    for own, full in _tp_boxes(variable, *tp):
        kept = own.intersect(own_limits)
        if kept is None:
            continue
        shifted = kept.inside(own).after(full).intersect(user_limits)
        if shifted is not None:
            found.append(Held(shifted.inside(full).after(own).inside(own_limits), shifted))
    return found


def boxes_of(shard: Shard, mesh: Mesh) -> list[Held]:
    """The boxes of what this rank holds of one parameter or buffer."""
    tp = (mesh.tp.rank, mesh.tp.size)
    if not shard.is_dp_sharded:
        return held_boxes(shard.variable, tp=tp)
    total = shard.variable.placement.local_shape(shard.variable.shape, mesh.tp.size)[0]
    # FSDP cuts as Tensor.chunk does: only the last ranks have fewer rows.
    start = min(-(-total // mesh.dp.size) * mesh.dp.rank, total)
    return held_boxes(shard.variable, tp=tp, rows=(start, shard.local.shape[0]))


def _tp_boxes(variable: Variable, rank: int, size: int) -> list[tuple[Box, Box]]:
    """For each segment of the sharded dimension, the box on this tp rank and in the full tensor."""
    placement, shape = variable.placement, variable.shape
    if not placement.is_shard:
        return [(whole(shape), whole(shape))]
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

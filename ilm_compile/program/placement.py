"""Placement types: how one value of the graph lies over the ranks of a mesh axis.

A value is one of

* ``I``            invariant: the same value on all ranks, and the same gradient on all ranks;
* ``R``            replicated: the same value on all ranks, but each rank holds a *part* of the
                   gradient, and the parts add up to the true one;
* ``S(dim)``       sharded: rank r holds the r-th equal slice of dimension `dim`;
* ``S(dim, segments)``  the dimension is a concatenation of parts (a fused q|k|v projection) of the
                   given sizes, and each part is sharded on its own: rank r holds the r-th slice of
                   every part, concatenated;
* ``S(dim, folded)``  rank r of n holds pieces r and 2n - 1 - r of 2n, from the head and the tail:
                   under a causal mask every rank then has the same work. With segments, of each;
* ``P``            partial: the true value is the sum over the ranks.

Rows that a mixture of experts has sorted are one of

* ``T``            each rank holds the rows of its own tokens, which lie as S(0) (or S(0, segments))
                   says, in the order of their experts;
* ``C``            counts of such rows, one for each expert: each rank has those of its own T;
* ``D``            dispatched: each rank holds the rows of all tokens for its own experts, brought
                   from the T of all ranks;
* ``E``            each rank holds the rows of its own experts, taken from R.

How many rows D and E are depends on the batch; shapes speak of the even share.

The difference between I and R is what makes the backward pass right. The lattice follows Meta's
spmd_types (R, I, V, P); segments are what fused projections need on top of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

_TEXT = re.compile(
    r"(?P<kind>[IRPCE])|S\((?P<dim>\d+)(, segments=\((?P<segments>[\d, ]+)\))?"
    r"(?P<folded>, folded)?\)"
    r"|(?P<rows>[TD])(\((segments=\((?P<parts>[\d, ]+)\))?(, )?(?P<folded_rows>folded)?\))?"
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a value lies on one mesh axis; `str()` and `parse` are inverse to each other."""

    kind: str
    dim: int = -1
    segments: tuple[int, ...] = ()
    folded: bool = False

    @property
    def is_shard(self) -> bool:
        """Whether the value is split over the ranks."""
        return self.kind == "S"

    @property
    def cuts(self) -> bool:
        """Whether a rank holds a part of the value only: as a shard, or as rows of experts."""
        return self.kind in "STDE"

    def __str__(self) -> str:
        segments = ", ".join(map(str, self.segments))
        words = [str(self.dim)] if self.is_shard else []
        words += [f"segments=({segments})"] if segments else []
        words += ["folded"] if self.folded else []
        return f"{self.kind}({', '.join(words)})" if words else self.kind

    __repr__ = __str__

    @staticmethod
    @cache
    def parse(text: str) -> Placement:
        """Return the placement written as `text`, for example ``"P"`` or ``"S(1)"``."""
        match = _TEXT.fullmatch(text)
        if match is None:
            expected = "I, R, P, S(dim) or S(dim, segments=(...)), either with ', folded'"
            raise ValueError(f"placement: expected {expected}, got {text!r}")
        if match["kind"]:
            return Placement(match["kind"]) if match["kind"] != "E" else E
        listed = match["segments"] or match["parts"] or ""
        sizes = tuple(int(size) for size in listed.split(",") if size.strip())
        tokens = S(
            int(match["dim"] or 0), sizes, folded=bool(match["folded"] or match["folded_rows"])
        )
        return rows_of(match["rows"], tokens) if match["rows"] else tokens

    def along(self, dim: int) -> Placement:
        """Return the placement that cuts dimension `dim` as this one cuts its own."""
        return replace(self, dim=dim)

    def local_shape(self, shape: Sequence[int], size: int) -> tuple[int, ...]:
        """Return the shape one of `size` ranks holds of a value of global `shape`."""
        if not self.cuts:
            return tuple(shape)
        return tuple(n // size if dim == self.dim else n for dim, n in enumerate(shape))

    def global_shape(self, shape: Sequence[int], size: int) -> tuple[int, ...]:
        """Return the global shape of a value whose rank-local shape is `shape`."""
        if not self.cuts:
            return tuple(shape)
        return tuple(n * size if dim == self.dim else n for dim, n in enumerate(shape))

    def divides(self, shape: Sequence[int], size: int) -> bool:
        """Whether a value of global `shape` splits evenly over `size` ranks."""
        if not self.cuts:
            return True
        if self.dim >= len(shape):
            return False
        parts = self.segments or (shape[self.dim],)
        whole = sum(parts) == shape[self.dim]
        return whole and all(part % (size * self.halves) == 0 and part > 0 for part in parts)

    @property
    def halves(self) -> int:
        """The pieces of each segment that a rank holds: two of a folded one."""
        return 1 + self.folded

    def held(self, length: int, size: int, rank: int) -> list[tuple[int, int]]:
        """Return (start, stop) of the pieces of the cut dimension that `rank` holds, in its order.

        length: of the whole dimension.
        """
        pieces: list[tuple[int, int]] = []
        first = 0
        for segment in self.segments or (length,):
            width = segment // (size * self.halves)
            starts = (first + n * width for n in (rank, 2 * size - 1 - rank)[: self.halves])
            pieces += [(start, start + width) for start in starts]
            first += segment
        return pieces


I = Placement("I")  # noqa: E741 - the field's name for it
R = Placement("R")
P = Placement("P")


def S(dim: int, segments: Sequence[int] = (), *, folded: bool = False) -> Placement:
    """Return the placement sharded on dimension `dim`; one segment is no segment."""
    return Placement("S", dim, tuple(segments) if len(segments) > 1 else (), folded)


def rows_of(kind: str, tokens: Placement) -> Placement:
    """Return the placement T or D of sorted rows that were cut as `tokens`, or S of T."""
    return replace(tokens, kind=kind, dim=0)


C = Placement("C")
D = Placement("D", 0)
E = Placement("E", 0)


def split_shards(full: Tensor, placement: Placement, size: int) -> list[Tensor]:
    """Return the shard of each of `size` ranks of `full`."""
    dim = placement.dim
    sizes = placement.segments or (full.shape[dim],)
    parts = torch.split(full, list(sizes), dim)
    chunks = [part.chunk(size * placement.halves, dim) for part in parts]
    return [
        _concatenate([c[i] for c in chunks for i in (r, -1 - r)[: placement.halves]], dim)
        for r in range(size)
    ]


def join_shards(shards: Sequence[Tensor], placement: Placement) -> Tensor:
    """Return the full tensor that `split_shards` cuts into `shards`."""
    size, dim, halves = len(shards), placement.dim, placement.halves
    if not placement.segments and not placement.folded:
        return _concatenate(list(shards), dim)
    segments = placement.segments or (shards[0].shape[dim] * size,)
    local = [segment // size // halves for segment in segments for _ in range(halves)]
    columns = zip(*(torch.split(shard, local, dim) for shard in shards), strict=True)
    ordered = (c[::-1] if i % halves else c for i, c in enumerate(columns))  # tails run backwards
    return _concatenate([piece for column in ordered for piece in column], dim)


def _concatenate(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

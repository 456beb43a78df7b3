"""The part of a checkpoint that one rank wrote: its files, and the slices that are in them.

``part-00003.json`` is sealed as the manifest is, and names the save that it belongs to, so that one
of another save is noticed. Who reads a tensor reads the parts of ranks that wrote slices of it, in
the order in which it expects to find what it needs, and only until it has.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import (
    SPLIT,
    File,
    Manifest,
    Ranks,
    Record,
    Slice,
    check_kinds,
    files_json,
    read_contents,
    record_json,
    seal,
    unseal,
)
from ilm_compile.runtime.checkpoint.storage import Storage, read_whole

FORMAT = "ilm_compile part of a checkpoint"
RANDOM = "random"  # tensors random/RANK/SOURCE are of one rank, and in its part alone


def part_name(rank: int) -> str:
    """The file of a rank's part."""
    return f"part-{rank:05d}.json"


@dataclass(slots=True)
class Part:
    """What the rank `rank` wrote for the save `save`. tensors: with the slices in `files`."""

    save: str
    rank: int
    files: dict[str, File] = field(default_factory=dict)
    tensors: dict[str, Record] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """The content of its file."""
        return seal(
            {
                "format": FORMAT,
                "version": SPLIT,
                "save": self.save,
                "rank": self.rank,
                "files": files_json(self.files),
                "tensors": {name: record_json(record) for name, record in self.tensors.items()},
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, path: str) -> Part:
        """Read and check the content of the file at `path`."""
        body = unseal(data, path, FORMAT, (SPLIT,))
        check_kinds(body, {"save": str, "rank": int}, path)
        return cls(body["save"], body["rank"], *read_contents(body, path))


def read_part(storage: Storage, name: str, rank: int, save: str) -> Part:
    """The part of `rank` of the checkpoint in folder `name`. Raises `CheckpointError`."""
    path = f"{storage.url}/{name}/{part_name(rank)}"
    try:
        part = Part.from_bytes(read_whole(storage, f"{name}/{part_name(rank)}"), path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist although its rank has written it; expected a folder that all "
            "nodes share, with all files of the checkpoint"
        ) from None
    if (part.save, part.rank) != (save, rank):
        raise CheckpointError(
            f"{path}: expected the part of rank {rank} of save {save!r:.100}, got that of rank "
            f"{part.rank} of save {part.save!r:.100}"
        )
    return part


def contents(
    storage: Storage, name: str, manifest: Manifest, *, rank: int = 0, size: int = 1
) -> Iterator[Part]:
    """All of a checkpoint, part by part; of `size` equal shares the one with number `rank`."""
    if manifest.save:
        for writer in range(rank, manifest.world_size, size):
            yield read_part(storage, name, writer, manifest.save)
    else:
        files = dict(list(manifest.files.items())[rank::size])
        yield Part("", rank, files, manifest.tensors)


class Finder:
    """Finds slices of tensors in the parts of a split checkpoint.

    place, out of `places`: of the reader among all, near which the slices it needs were written
    under the same plan, and often under another.
    """

    def __init__(
        self, storage: Storage, name: str, manifest: Manifest, *, place: int, places: int
    ) -> None:
        self._storage, self._name, self._manifest = storage, name, manifest
        self._place = place * manifest.world_size // places
        self._parts: dict[int, Part] = {}

    def slices(self, tensor: str, record: Record) -> Iterator[Slice]:
        """Those of a tensor, likely ones first; parts are read as this is iterated over."""
        kind, _, rest = tensor.partition("/")
        writers = near(record.writers, self._place)
        if kind == RANDOM:
            writers = iter([int(rest.partition("/")[0])])
        read = [rank for rank, part in self._parts.items() if tensor in part.tensors]
        for rank in chain(read, (rank for rank in writers if rank not in read)):
            yield from self._of(rank, tensor, record)

    def random(self, rank: int) -> dict[str, Record]:
        """What there is of the random states of a rank."""
        prefix = f"{RANDOM}/{rank}/"
        return {n: r for n, r in self._part(rank).tensors.items() if n.startswith(prefix)}

    def _of(self, rank: int, tensor: str, record: Record) -> Sequence[Slice]:
        found = self._part(rank).tensors.get(tensor)
        if found is None:
            return ()
        if (found.dtype, found.shape) != (record.dtype, record.shape):
            raise CheckpointError(
                f"{self._storage.url}/{self._name}/{part_name(rank)}: expected {tensor!r} to be "
                f"{record.dtype} {list(record.shape)}, got {found.dtype} {list(found.shape)}"
            )
        return found.slices

    def _part(self, rank: int) -> Part:
        if rank not in self._parts:
            part = read_part(self._storage, self._name, rank, self._manifest.save)
            self._parts[rank] = part
        return self._parts[rank]


def near(ranks: Ranks, place: int) -> Iterator[int]:
    """The ranks outwards from `place`, in turns one below (or at it) and one above."""
    below, above = [], []
    for first, last, step in ranks:
        top = min(last, place)
        below.append(range(top - (top - first) % step if top >= first else -1, first - 1, -step))
        least = max(first, place + 1)
        above.append(range(least + (first - least) % step, last + 1, step))
    down = heapq.merge(*below, key=lambda rank: -rank)
    up = heapq.merge(*above)
    for pair in zip_all(down, up):
        yield from pair


def zip_all(*each: Iterator[int]) -> Iterator[list[int]]:
    """The next of all that have one, until none has."""
    while found := [value for one in each if (value := next(one, None)) is not None]:
        yield found


def runs(ranks: Iterable[int]) -> Ranks:
    """The ranks, which ascend, as few runs."""
    found: list[tuple[int, int, int]] = []
    for rank in ranks:
        first, last, step = found[-1] if found else (0, 0, 0)
        if found and (first == last or rank - last == step):
            found[-1] = (first, rank, rank - last)
        else:
            found.append((rank, rank, 1))
    return tuple(found)

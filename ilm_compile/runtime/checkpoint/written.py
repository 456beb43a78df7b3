"""What all ranks write together: which tensors, by whom, and that no element is left out.

Ranks that write the same names, as all of a pipeline stage mostly do, are told of once, so neither
the time of rank 0 nor the manifest grows with the number of data-parallel ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ilm_compile.runtime.agree import broadcast, exchange
from ilm_compile.runtime.checkpoint.boxes import whole
from ilm_compile.runtime.checkpoint.contents import Piece
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import Manifest, Record, check_tiling
from ilm_compile.runtime.checkpoint.parts import RANDOM, read_part, runs
from ilm_compile.runtime.checkpoint.sound import check_sizes
from ilm_compile.runtime.checkpoint.storage import Storage
from ilm_compile.runtime.checkpoint.tensor_file import DTYPE_NAMES, DTYPES
from ilm_compile.runtime.mesh import Mesh

_PRIME = 2**48 - 59  # so that a sum over any number of ranks is exact


def tables(pieces: Sequence[Piece], groups: list[list[str]], mesh: Mesh) -> dict[str, list[int]]:
    """What ranks write, as JSON for `fill`, and who writes just that. Collective."""
    kinds = {
        piece.name: [list(piece.shape), DTYPE_NAMES[piece.value.dtype], piece.is_number]
        for piece in pieces
        if not _is_random(piece.name)
    }
    own = json.dumps([kinds, groups]).encode()
    digest = int.from_bytes(hashlib.sha256(own).digest()[:6])
    ranks: dict[float, list[int]] = {}
    for rank, (each,) in enumerate(exchange([float(digest)], mesh)):
        ranks.setdefault(each, []).append(rank)
    return {
        broadcast(own if mesh.rank == who[0] else b"", mesh, source=who[0]).decode(): who
        for who in ranks.values()
    }


def fill(manifest: Manifest, given: dict[str, list[int]]) -> None:
    """Write down what `tables` gave. Raises `CheckpointError` if ranks contradict each other."""
    writers: dict[str, list[int]] = {}
    for text, ranks in given.items():
        kinds, groups = json.loads(text)
        for name, (shape, dtype, is_number) in kinds.items():
            new = Record(DTYPES[dtype], tuple(shape), is_number=is_number)
            if manifest.tensors.setdefault(name, new) != new:
                raise CheckpointError(f"{name}: rank {ranks[0]} has another kind of it than others")
            writers.setdefault(name, []).extend(ranks)
        for group, names in zip(manifest.groups, groups, strict=True):
            group["params"] = list(dict.fromkeys([*group["params"], *names]))
    sets: dict[tuple[int, ...], Any] = {}
    for name, who in writers.items():
        key = tuple(sorted(who))
        if key not in sets:
            sets[key] = runs(key)
        manifest.tensors[name].writers = sets[key]


def cover(pieces: Iterable[Piece]) -> int:
    """A number of which the sum over all ranks is `full_cover` where no element is missing."""
    return sum(_weight(p.name, p.box.numel) for p in pieces if not _is_random(p.name)) % _PRIME


def check_written(
    storage: Storage, working: str, manifest: Manifest, own_cover: int, mesh: Mesh
) -> list[str]:
    """Find out whether a save is complete, each rank for the next. Collective.

    Returns what is wrong, for the one who asked, if anything; a folder that the nodes do not share
    is.
    """
    total = torch.tensor(own_cover, device=mesh.device)
    found = int(mesh.everyone.all_reduce(total)) % _PRIME
    try:
        other = (mesh.rank + 1) % mesh.world_size
        check_sizes(storage, working, read_part(storage, working, other, manifest.save))
        if mesh.rank == 0 and found != _full_cover(manifest):
            _find_uncovered(storage, working, manifest)
    except (CheckpointError, OSError) as error:
        return [str(error)]
    return []


def _full_cover(manifest: Manifest) -> int:
    sizes = ((name, whole(record.shape).numel) for name, record in manifest.tensors.items())
    return sum(_weight(name, numel) for name, numel in sizes) % _PRIME


def _find_uncovered(storage: Storage, working: str, manifest: Manifest) -> None:
    """Raise `CheckpointError` naming a tensor whose slices do not make it up. Reads all parts."""
    for rank in range(manifest.world_size):
        part = read_part(storage, working, rank, manifest.save)
        for name, record in part.tensors.items():
            if name in manifest.tensors:
                manifest.tensors[name].slices += record.slices
    for name, record in manifest.tensors.items():
        check_tiling(record, name)
    raise CheckpointError("the slices that were written are not those that were to be")


def _weight(name: str, numel: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) * numel


def _is_random(name: str) -> bool:
    return name.startswith(f"{RANDOM}/")

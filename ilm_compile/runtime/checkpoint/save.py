"""Writes one checkpoint: every rank its files, in a thread; then rank 0 the manifest.

A rank describes what it wrote in a part file, ``part-RANK.json``, which rank 0 merges into the
manifest. That rank 0 finds the files of all ranks, in their sizes, is checked there: a folder that
the nodes do not share is an error and not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any, BinaryIO

from ilm_compile.runtime.checkpoint.boxes import Box
from ilm_compile.runtime.checkpoint.contents import Piece
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import (
    File,
    Manifest,
    Record,
    Slice,
    check_tiling,
)
from ilm_compile.runtime.checkpoint.sound import check_finite
from ilm_compile.runtime.checkpoint.storage import Storage
from ilm_compile.runtime.checkpoint.tensor_file import (
    DTYPE_NAMES,
    DTYPES,
    SUFFIX,
    load_json,
    write_tensor_file,
)

MAX_FILE_BYTES = 4 << 30


class HashingFile:
    """A file object for writing that knows the size and sha256 of what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0

    def write(self, data: Any) -> int:
        """Write and count; `data` is bytes or a view of them."""
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    def result(self) -> File:
        """Of everything written so far."""
        return File(self._size, self._digest.hexdigest())


def write_part(
    storage: Storage,
    working: str,
    rank: int,
    pieces: Iterable[Piece],
    groups: list[list[str]],
) -> None:
    """Write this rank's tensors, in files of at most about 4 GiB, and its part file.

    Raises `CheckpointError` if the folder that rank 0 has made is not there, or if a tensor is not
    finite, before anything is written.
    """
    trained = {name for names in groups for name in names}
    for piece in (pieces := list(pieces)):
        check_finite(piece.name, piece.value, trained, "this state")
    try:
        _write_part(storage, working, rank, pieces, groups)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{storage.url}/{working} is not there although rank 0 has made it; expected a folder "
            "that all nodes share"
        ) from error


def _write_part(
    storage: Storage,
    working: str,
    rank: int,
    pieces: Iterable[Piece],
    groups: list[list[str]],
) -> None:
    files: dict[str, File] = {}
    records: list[Any] = []
    for index, batch in enumerate(_batches(pieces)):
        file_name = f"rank-{rank:05d}-{index:03d}{SUFFIX}"
        keys = {f"{piece.name}@{number}": piece for number, piece in enumerate(batch)}
        specs = {key: (p.value.dtype, tuple(p.value.shape)) for key, p in keys.items()}
        with storage.create(f"{working}/{file_name}") as file:
            hashing = HashingFile(file)
            write_tensor_file(hashing, specs, (p.value for p in batch), {"format": "pt"})  # type: ignore[arg-type]
        files[file_name] = hashing.result()
        records += [_piece_json(piece, file_name, key) for key, piece in keys.items()]
    part = {
        "files": {name: [file.size, file.sha256] for name, file in files.items()},
        "pieces": records,
        "groups": groups,
    }
    with storage.create(f"{working}/{_part_name(rank)}") as file:
        file.write(json.dumps(part).encode())


def merge_parts(storage: Storage, working: str, manifest: Manifest) -> None:
    """Complete `manifest` by the part files of all ranks. Raises `CheckpointError`."""
    for rank in range(manifest.world_size):
        path = f"{working}/{_part_name(rank)}"
        part = _read_part(storage, path)
        for name, (size, sha256) in part["files"].items():
            if (found := storage.size(f"{working}/{name}")) != size:
                raise CheckpointError(
                    f"{storage.url}/{working}/{name}: wrote {size} bytes, found {found}"
                )
            manifest.files[name] = File(size, sha256)
        for name, shape, dtype, is_number, file, key, start, sizes in part["pieces"]:
            new = Record(DTYPES[dtype], tuple(shape), is_number=is_number)
            record = manifest.tensors.setdefault(name, new)
            record.slices.append(Slice(file, key, Box(tuple(start), tuple(sizes))))
        for group, names in zip(manifest.groups, part["groups"], strict=True):
            group["params"] = list(dict.fromkeys([*group["params"], *names]))
        storage.delete(path)
    for name, record in manifest.tensors.items():
        check_tiling(record, f"checkpoint of step {manifest.step}: {name}")


def _read_part(storage: Storage, path: str) -> dict[str, Any]:
    try:
        with storage.open(path) as file:
            return load_json(file.read(), path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{storage.url}/{path} does not exist although its rank has written it; expected a "
            "folder that all nodes share"
        ) from None


def _part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _piece_json(piece: Piece, file_name: str, key: str) -> list[Any]:
    dtype, box = DTYPE_NAMES[piece.value.dtype], piece.box
    return [
        piece.name, list(piece.shape), dtype, piece.is_number, file_name, key, box.start, box.sizes,
    ]  # fmt: skip


def _batches(pieces: Iterable[Piece]) -> Iterable[list[Piece]]:
    """The pieces file by file; wider dtypes first, so that each tensor is aligned."""
    batch: list[Piece] = []
    size = 0
    for piece in sorted(pieces, key=lambda p: -p.value.dtype.itemsize):
        if batch and size + piece.value.nbytes > MAX_FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.value.nbytes
    if batch:
        yield batch

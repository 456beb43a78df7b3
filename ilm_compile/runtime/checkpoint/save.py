"""Writes a rank's part of a checkpoint, in a thread: its tensors in files, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, BinaryIO

from ilm_compile.runtime.checkpoint.contents import Piece
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import File, Record, Slice
from ilm_compile.runtime.checkpoint.parts import Part, part_name
from ilm_compile.runtime.checkpoint.sound import check_finite
from ilm_compile.runtime.checkpoint.storage import Storage
from ilm_compile.runtime.checkpoint.tensor_file import SUFFIX, write_tensor_file

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
    part: Part,
    pieces: Iterable[Piece],
    groups: list[list[str]],
) -> None:
    """Write this rank's tensors, in files of at most about 4 GiB, and `part`, which is empty yet.

    groups: the names in its param groups. Raises `CheckpointError` if the folder that rank 0 has
    made is not there, or if a tensor is not finite, before anything is written.
    """
    trained = {name for names in groups for name in names}
    for piece in (pieces := list(pieces)):
        check_finite(piece.name, piece.value, trained, "this state")
    try:
        _write_part(storage, working, part, pieces)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{storage.url}/{working} is not there although rank 0 has made it; expected a folder "
            "that all nodes share"
        ) from error


def _write_part(storage: Storage, working: str, part: Part, pieces: Iterable[Piece]) -> None:
    for index, batch in enumerate(_batches(pieces)):
        file_name = f"rank-{part.rank:05d}-{index:03d}{SUFFIX}"
        keys = {f"{piece.name}@{number}": piece for number, piece in enumerate(batch)}
        specs = {key: (p.value.dtype, tuple(p.value.shape)) for key, p in keys.items()}
        with storage.create(f"{working}/{file_name}") as file:
            hashing = HashingFile(file)
            write_tensor_file(hashing, specs, (p.value for p in batch), {"format": "pt"})  # type: ignore[arg-type]
        part.files[file_name] = hashing.result()
        for key, piece in keys.items():
            new = Record(piece.value.dtype, piece.shape, is_number=piece.is_number)
            record = part.tensors.setdefault(piece.name, new)
            record.slices.append(Slice(file_name, key, piece.box))
    with storage.create(f"{working}/{part_name(part.rank)}") as file:
        file.write(part.to_bytes())


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

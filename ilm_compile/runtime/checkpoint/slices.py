"""Reads boxes of full tensors out of the slices of a checkpoint, and checks its files."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ilm_compile.runtime.checkpoint.boxes import Box, whole
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import File, Manifest, Record, Slice, check_cover
from ilm_compile.runtime.checkpoint.parts import RANDOM, Finder
from ilm_compile.runtime.checkpoint.storage import MANIFEST, Storage, read_whole
from ilm_compile.runtime.checkpoint.tensor_file import Entry, read_box, read_header

HASH_BYTES = 4 << 20


def has_manifest(storage: Storage, name: str) -> bool:
    """Whether checkpoint `name` was ever complete."""
    try:
        return storage.size(f"{name}/{MANIFEST}") > 0
    except FileNotFoundError:
        return False


def read_manifest(storage: Storage, name: str) -> Manifest:
    """The manifest of checkpoint `name`. Raises `CheckpointError` if it has none or a bad one."""
    path = f"{storage.url}/{name}/{MANIFEST}"
    try:
        data = read_whole(storage, f"{name}/{MANIFEST}")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: the checkpoint is incomplete, or the path is of none"
        ) from None
    return Manifest.from_bytes(data, path)


def check_file(storage: Storage, name: str, file_name: str, expected: File) -> None:
    """Raise `CheckpointError` naming the file unless its size and sha256 are as expected."""
    path = f"{storage.url}/{name}/{file_name}"
    try:
        size = storage.size(f"{name}/{file_name}")
        if size != expected.size:
            raise CheckpointError(f"{path}: expected {expected.size} bytes, got {size}")
        digest = hashlib.sha256()
        with storage.open(f"{name}/{file_name}") as file:
            while data := file.read(HASH_BYTES):
                digest.update(data)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if digest.hexdigest() != expected.sha256:
        raise CheckpointError(
            f"{path}: its sha256 is not the one that was written down; the file is damaged"
        )


class TensorReader(ABC):
    """Puts full tensors, or boxes of them, together from the slices of a manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def read(self, tensor: str, box: Box | None = None) -> Tensor:
        """The elements `box` of a full tensor, all of them if None; reads only what it needs."""
        record = self.record(tensor)
        wanted = whole(record.shape) if box is None else box
        left, found = wanted.numel, list[tuple[Slice, Box]]()
        for piece in self.slices(tensor, record) if left else ():
            common = piece.box.intersect(wanted)
            if common is not None:
                found.append((piece, common))
                left -= common.numel
                if left <= 0:
                    break
        held = [common.inside(wanted) for _, common in found]
        check_cover(held, whole(wanted.sizes), f"{self.where}: {tensor}")
        # Not before: a damaged manifest may speak of any size.
        out = torch.empty(wanted.sizes, dtype=record.dtype)
        for (piece, common), place in zip(found, held, strict=True):
            place.of(out).copy_(self.read_slice(record, piece, common.inside(piece.box)))
        return out

    @property
    def where(self) -> str:
        """What is read, for errors."""
        return f"checkpoint of step {self.manifest.step}"

    def record(self, tensor: str) -> Record:
        """The kind of a tensor."""
        return self.manifest.tensors[tensor]

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of this name."""
        return tensor in self.manifest.tensors

    def slices(self, tensor: str, record: Record) -> Iterable[Slice]:
        """The slices of a tensor, all or until the one who asks has enough."""
        return record.slices

    @abstractmethod
    def read_slice(self, record: Record, piece: Slice, box: Box) -> Tensor:
        """The elements `box`, in coordinates of the slice."""


class SliceReader(TensorReader):
    """Opens each file of a checkpoint once; a context manager. place, places: as for `Finder`."""

    def __init__(
        self, storage: Storage, name: str, manifest: Manifest, *, place: int = 0, places: int = 1
    ) -> None:
        super().__init__(manifest)
        self._finder = Finder(storage, name, manifest, place=place, places=places)
        self._storage = storage
        self._name = name
        self._stack = ExitStack()
        self._files: dict[str, tuple[Any, dict[str, Entry]]] = {}

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def where(self) -> str:
        return f"{self._storage.url}/{self._name}"

    def record(self, tensor: str) -> Record:
        if self.manifest.save and tensor.startswith(f"{RANDOM}/"):
            return self._finder.random(int(tensor.split("/")[1]))[tensor]
        return super().record(tensor)

    def has(self, tensor: str) -> bool:
        if self.manifest.save and tensor.startswith(f"{RANDOM}/"):
            return tensor in self._finder.random(int(tensor.split("/")[1]))
        return super().has(tensor)

    def slices(self, tensor: str, record: Record) -> Iterable[Slice]:
        if self.manifest.save:
            return self._finder.slices(tensor, record)
        return record.slices

    def read_slice(self, record: Record, piece: Slice, box: Box) -> Tensor:
        file, entry, path = self._find(piece.file, piece.key)
        if (entry.dtype, entry.shape) != (record.dtype, piece.box.sizes):
            raise CheckpointError(
                f"{path}: expected {piece.key!r} to be {record.dtype} "
                f"{list(piece.box.sizes)}, got {entry.dtype} {list(entry.shape)}"
            )
        return read_box(file, entry, box, path)

    def _find(self, file_name: str, key: str) -> tuple[Any, Entry, str]:
        path = f"{self._storage.url}/{self._name}/{file_name}"
        if file_name not in self._files:
            try:
                size = self._storage.size(f"{self._name}/{file_name}")
                file = self._stack.enter_context(self._storage.open(f"{self._name}/{file_name}"))
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
            self._files[file_name] = (file, read_header(file, size, path))
        file, entries = self._files[file_name]
        if key not in entries:
            raise CheckpointError(f"{path}: the tensor {key!r} that was written is not in it")
        return file, entries[key], path

"""Reads boxes of full tensors out of the slices of a checkpoint, and checks its files."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ilm_compile.runtime.checkpoint.boxes import Box, whole
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest, Record, Slice
from ilm_compile.runtime.checkpoint.storage import MANIFEST, Storage
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
        size = storage.size(f"{name}/{MANIFEST}")
        if size > MAX_MANIFEST_BYTES:
            raise CheckpointError(
                f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, got {size}"
            )
        with storage.open(f"{name}/{MANIFEST}") as file:
            data = file.read(size)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} does not exist: the checkpoint is incomplete, or the path is of none"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return Manifest.from_bytes(data, path)


def check_file(storage: Storage, name: str, manifest: Manifest, file_name: str) -> None:
    """Raise `CheckpointError` naming the file unless its size and sha256 are the manifest's."""
    path, expected = f"{storage.url}/{name}/{file_name}", manifest.files[file_name]
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
            f"{path}: its sha256 is not the one of the manifest; the file is damaged"
        )


class TensorReader(ABC):
    """Puts full tensors, or boxes of them, together from the slices of a manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def read(self, tensor: str, box: Box | None = None) -> Tensor:
        """The elements `box` of a full tensor, all of them if None; reads only what it needs."""
        record = self.manifest.tensors[tensor]
        wanted = whole(record.shape) if box is None else box
        out = torch.empty(wanted.sizes, dtype=record.dtype)
        for piece in record.slices:
            common = piece.box.intersect(wanted)
            if common is not None:
                value = self.read_slice(record, piece, common.inside(piece.box))
                common.inside(wanted).of(out).copy_(value)
        return out

    @abstractmethod
    def read_slice(self, record: Record, piece: Slice, box: Box) -> Tensor:
        """The elements `box`, in coordinates of the slice."""


class SliceReader(TensorReader):
    """Opens each file of a checkpoint once; a context manager."""

    def __init__(self, storage: Storage, name: str, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._storage = storage
        self._name = name
        self._stack = ExitStack()
        self._files: dict[str, tuple[Any, dict[str, Entry]]] = {}

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

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
            raise CheckpointError(f"{path}: the manifest's tensor {key!r} is not in it")
        return file, entries[key], path

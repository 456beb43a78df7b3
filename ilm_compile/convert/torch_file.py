"""A file of `torch.save` as tensors whose bytes can be read one box at a time."""

from __future__ import annotations

import struct
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from ilm_compile.convert.torch_pickle import TensorRef, read_state_dict
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.checkpoint.boxes import Box
from ilm_compile.runtime.checkpoint.tensor_file import Entry, read_box

MAX_PICKLE_BYTES = 64 << 20
# What zipfile raises for archives that are none.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    OSError,
    RuntimeError,
    EOFError,
)
_LOCAL_HEADER = 30  # bytes of a member's own header, before its name and extra field


class TorchFile:
    """The tensors of one file. Raises `IlmCompileError` naming it for anything out of order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("rb")
        try:
            with zipfile.ZipFile(self._file) as archive:
                members = {info.filename: info for info in archive.infolist()}
                pickles = [name for name in members if name.endswith("/data.pkl")]
                if len(pickles) != 1 or members[pickles[0]].file_size > MAX_PICKLE_BYTES:
                    raise IlmCompileError(f"{path}: expected one data.pkl, got {len(pickles)}")
                pickle = archive.read(pickles[0])
                prefix = pickles[0].removesuffix("data.pkl")
                self._check_byte_order(archive, members, prefix)
        except IlmCompileError:
            raise
        except _BROKEN as error:
            raise IlmCompileError(
                f"{path}: expected a file of torch.save (1.6 or later): {error}"
            ) from None
        self.entries: dict[str, Entry] = {}
        for name, tensor in read_state_dict(pickle, str(path)).items():
            member = members.get(f"{prefix}data/{tensor.storage.key}")
            if member is None:
                raise IlmCompileError(f"{path}: {name}: its data are missing")
            self.entries[name] = self._entry(name, tensor, member)

    def read(self, name: str, box: Box) -> Tensor:
        """A part of a tensor."""
        return read_box(self._file, self.entries[name], box, str(self.path))

    def _check_byte_order(
        self, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], prefix: str
    ) -> None:
        member = members.get(f"{prefix}byteorder")
        if member is not None and (member.file_size > 16 or archive.read(member) != b"little"):
            raise IlmCompileError(f"{self.path}: expected little-endian data")

    def _entry(self, name: str, tensor: TensorRef, member: zipfile.ZipInfo) -> Entry:
        where, itemsize = f"{self.path}: {name}", tensor.storage.dtype.itemsize
        if member.compress_type != zipfile.ZIP_STORED:
            raise IlmCompileError(f"{where}: expected data that are not compressed")
        if tensor.stride != _contiguous(tensor.shape) and prod(tensor.shape) > 1:
            raise IlmCompileError(
                f"{where}: expected a contiguous tensor, got shape {tensor.shape} and stride "
                f"{tensor.stride}; save it with .contiguous()"
            )
        if (tensor.offset + prod(tensor.shape)) * itemsize > member.file_size:
            raise IlmCompileError(f"{where}: reaches beyond its data")
        start = self._data_start(member) + tensor.offset * itemsize
        return Entry(tensor.storage.dtype, tensor.shape, start)

    def _data_start(self, member: zipfile.ZipInfo) -> int:
        self._file.seek(member.header_offset)
        header = self._file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
            raise IlmCompileError(f"{self.path}: {member.filename}: expected a zip member")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return member.header_offset + _LOCAL_HEADER + lengths


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))

"""Reads and writes safetensors files by byte ranges, from any file object, trusting nothing.

The format (huggingface/safetensors, README "Format"): 8 bytes little-endian length n, n bytes of
JSON ``{name: {"dtype", "shape", "data_offsets": [start, stop]}, "__metadata__": {...}}``, then the
data without holes. The safetensors package maps whole local files and does not report what is wrong
where; here every number is checked against the file's size before it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ilm_compile.runtime.checkpoint.boxes import Box
from ilm_compile.runtime.checkpoint.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
READ_BYTES = 8 << 20  # at most so much of a tensor is read at a time, or one row


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; `start` counts bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO, size: int, path: str) -> dict[str, Entry]:
    """The tensors of the file of `size` bytes at `path`. Raises `CheckpointError` naming it."""
    file.seek(0)
    length = int.from_bytes(_read(file, 8, path), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: expected a safetensors file, got a header of {length} bytes in a file of "
            f"{size} bytes; the file is cut short or of another format"
        )
    header = load_json(_read(file, length, path), path)
    entries = {
        name: _entry(record, 8 + length, f"{path}: tensor {name!r}")
        for name, record in header.items()
        if name != "__metadata__"
    }
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start != end:
            raise CheckpointError(
                f"{path}: expected the data of {name!r} at byte {end}, got {entry.start}"
            )
        end += entry.num_bytes
    if end != size:
        raise CheckpointError(f"{path}: expected {end} bytes by its header, got {size}")
    return entries


def read_box(file: BinaryIO, entry: Entry, box: Box, path: str) -> Tensor:
    """The elements `box` of a tensor; reads the rows that hold them, a few at a time."""
    out = torch.empty(box.sizes, dtype=entry.dtype)
    if out.numel() == 0:
        return out
    if not entry.shape:
        return _tensor(file, entry, entry.start, 1, path).reshape(())
    tail = entry.shape[1:]
    row_bytes = prod(tail) * entry.dtype.itemsize
    step = max(1, READ_BYTES // row_bytes)
    columns = Box((0, *box.start[1:]), box.sizes)
    for row in range(0, box.sizes[0], step):
        num_rows = min(step, box.sizes[0] - row)
        start = entry.start + (box.start[0] + row) * row_bytes
        rows = _tensor(file, entry, start, num_rows * prod(tail), path).view(num_rows, *tail)
        out[row : row + num_rows] = Box(columns.start, (num_rows, *box.sizes[1:])).of(rows)
    return out


def write_tensor_file(
    file: BinaryIO,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    values: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of the tensors `specs` describes, whose data are `values` one after the other.

    `values` may be the tensors in the order of `specs`, or their rows in any number of pieces.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    file.write(len(text).to_bytes(8, "little") + text)
    written = 0
    for value in values:
        data = value.detach().contiguous().flatten().view(torch.uint8).numpy()
        file.write(data.data)
        written += data.nbytes
    if written != end:
        raise CheckpointError(f"safetensors: expected {end} bytes of data, was given {written}")


def load_json(data: bytes, path: str) -> dict[str, Any]:
    """The JSON object in `data`, the content of `path`. Raises `CheckpointError`."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def is_shape(value: object) -> bool:
    """Whether `value`, read from JSON, is a list of at most 64 sizes."""
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(n) is int and 0 <= n < 2**48 for n in value)
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _entry(record: object, data_start: int, where: str) -> Entry:
    if not isinstance(record, dict) or set(record) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{where}: expected dtype, shape and data_offsets, got {record!r:.200}"
        )
    dtype, shape, offsets = record["dtype"], record["shape"], record["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: expected a dtype of {list(DTYPES)}, got {dtype!r:.200}")
    if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where}: expected lists of sizes, got {record!r:.200}")
    entry = Entry(DTYPES[dtype], tuple(shape), data_start + offsets[0])
    if entry.num_bytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: expected {entry.num_bytes} bytes for {dtype} {shape}, got {offsets}"
        )
    return entry


def _tensor(file: BinaryIO, entry: Entry, start: int, numel: int, path: str) -> Tensor:
    data = bytearray(numel * entry.dtype.itemsize)
    file.seek(start)
    got = file.readinto(data)  # type: ignore[attr-defined]  # every binary file has it
    if got != len(data):
        raise CheckpointError(
            f"{path}: expected {len(data)} more bytes, got {got}; the file is cut short"
        )
    return torch.frombuffer(data, dtype=torch.uint8).view(entry.dtype)


def _read(file: BinaryIO, size: int, path: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise CheckpointError(
            f"{path}: expected {size} more bytes, got {len(data)}; the file is cut short"
        )
    return data

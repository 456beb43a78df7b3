"""The index of a token file, ``x.bin.meta``: where each document lies, and what can be checked.

Layout (InternEvo, tools/tokenizer.py and internlm/data/tokenized/single_dataset.py): a NumPy array
with a row per document, its first column the byte offset of the document's line in ``x.bin``, its
last the number of tokens. Ours has the CRC-32 of the line between the two, which InternLM's reader
passes over; with it a changed digit is noticed when the line is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ilm_compile.errors import IlmCompileError

Int64 = np.ndarray[Any, np.dtype[np.int64]]

SUFFIX = ".meta"
SHORTEST_LINE = len('{"tokens":[]}')


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """starts: (documents + 1,) byte offsets, the last the file's size; lengths: in tokens.

    checksums: CRC-32 of each line, its end included; None for a file of InternLM's tools.
    """

    starts: Int64
    lengths: Int64
    checksums: Int64 | None


def index_path(shard: Path) -> Path:
    """Where the index of token file `shard` is."""
    return shard.with_name(shard.name + SUFFIX)


def read_index(shard: Path, num_bytes: int) -> ShardIndex:
    """Read and check the index of `shard`, a file of `num_bytes`.

    Raises `IlmCompileError` naming file and offset if there is none, if it is not an index, or if
    it cannot be that of such a file: documents beyond its end (a truncated file), out of order, or
    with more tokens than fit into their line.
    """
    path = index_path(shard)
    table = _load(path, shard)
    starts, lengths = _column(table, 0, path), _column(table, -1, path)
    checksums = _column(table, 1, path) if table.shape[1] == 3 else None
    if starts[0] != 0:
        raise _wrong(path, 0, "an offset of 0", f"{starts[0]}")
    _check_each(path, np.diff(starts) > 0, "offsets that grow", starts, after=1)
    _check_each(path, lengths >= 0, "lengths of at least 0", lengths)
    starts = np.append(starts, num_bytes)
    if starts[-2] >= num_bytes:
        first = int(np.flatnonzero(starts[:-1] >= num_bytes)[0])
        raise IlmCompileError(
            f"token file: document {first} should start at offset {starts[first]} of {shard}, "
            f"which has {num_bytes} bytes: it is truncated, or {path.name} is another file's; "
            "write both again with ilm-compile prepare-data"
        )
    # A token takes a digit at least, and a comma between two.
    needed = SHORTEST_LINE + np.maximum(2 * np.minimum(lengths, num_bytes) - 1, 0)
    _check_each(
        path, needed <= np.diff(starts), f"no more tokens than fit in {shard.name}", lengths
    )
    return ShardIndex(starts=starts, lengths=lengths, checksums=checksums)


def _load(path: Path, shard: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """The array of the file, mapped and not read."""
    if not path.is_file():
        raise IlmCompileError(
            f"token file: expected the index of {shard} at {path}, found none; write both with "
            "ilm-compile prepare-data"
        )
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # besides ValueError and OSError, whatever parsing the header raises
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise IlmCompileError(
            f"token file: cannot read {path} as a NumPy array: {reason}"
        ) from error
    if not isinstance(table, np.memmap):
        raise IlmCompileError(
            f"token file: expected one NumPy array in {path}, got {type(table).__name__}"
        )
    if table.ndim != 2 or table.shape[1] not in (2, 3) or table.dtype.kind not in "iu":
        raise IlmCompileError(
            f"token file: expected integers of shape (documents, 2 or 3) in {path}, got "
            f"{table.dtype} of shape {table.shape}"
        )
    if len(table) == 0:
        raise IlmCompileError(f"token file: {path} lists no document; remove it and {shard.name}")
    end, size = table.offset + table.nbytes, path.stat().st_size
    if end != size:
        raise IlmCompileError(
            f"token file: expected {path} to end at offset {end}, it has {size} bytes"
        )
    return table


def _column(table: np.ndarray[Any, np.dtype[Any]], column: int, path: Path) -> Int64:
    values = table[:, column]
    if values.dtype.kind == "u" and values.max() > np.iinfo(np.int64).max:
        first = int(values.argmax())
        raise _wrong(path, first, "numbers below 2**63", str(values[first]))
    return values.astype(np.int64)


def _check_each(path: Path, good: Any, expected: str, values: Int64, *, after: int = 0) -> None:
    if not good.all():
        first = int(np.flatnonzero(~good)[0]) + after
        raise _wrong(path, first, expected, str(values[first]))


def _wrong(path: Path, row: int, expected: str, got: str) -> IlmCompileError:
    return IlmCompileError(
        f"token file: expected {expected} in {path}, got {got} in row {row}; write the file again "
        "with ilm-compile prepare-data (InternLM's own tool writes 32-bit numbers, too small for "
        "files above 2 GiB)"
    )

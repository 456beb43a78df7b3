"""Writes token files: see `ilm_compile.runtime.data.shard` and `shard_index` for the layout."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.shard_index import index_path

TEMPORARY = ".tmp"


class ShardWriter:
    """Writes one token file at `path`; a context manager.

    Both files get temporary names and are renamed at the end of the block, the index last, so that
    a file with an index is complete. An error in the block removes them. Raises `IlmCompileError`
    if one of the final files exists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for final in (self.path, index_path(self.path)):
            if final.exists():
                raise IlmCompileError(
                    f"token file: {final} exists; remove it, or write to another place"
                )
        self.num_tokens = 0
        self.num_bytes = 0
        self._rows: list[tuple[int, int, int]] = []
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _temporary(self.path).open("wb")
        return self

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, tokens: Sequence[int]) -> None:
        """Append a document. A token with a minus sign is read, but is no target."""
        assert self._file is not None, "ShardWriter.add is for inside its with block"
        line = json.dumps({"tokens": list(tokens)}).encode() + b"\n"
        self._file.write(line)
        self._rows.append((self.num_bytes, zlib.crc32(line), len(tokens)))
        self.num_bytes += len(line)
        self.num_tokens += len(tokens)

    def __exit__(self, kind: object, *error: object) -> None:
        assert self._file is not None
        try:
            if kind is None and self._rows:
                self._finish(self._file)
        finally:
            self._file.close()
            for final in (self.path, index_path(self.path)):
                with suppress(FileNotFoundError):
                    _temporary(final).unlink()

    def _finish(self, file: BinaryIO) -> None:
        index = index_path(self.path)
        with _temporary(index).open("wb") as index_file:
            np.save(index_file, np.array(self._rows, dtype=np.int64))
            for each in (file, index_file):
                each.flush()
                os.fsync(each.fileno())
        for final in (self.path, index):
            os.rename(_temporary(final), final)


def write_shard(path: str | Path, documents: Iterable[Sequence[int]]) -> None:
    """Write one token file of these documents; see `ShardWriter`."""
    with ShardWriter(path) as writer:
        for tokens in documents:
            writer.add(tokens)
        if len(writer) == 0:
            raise IlmCompileError(
                f"token file: expected at least one document for {path}, got none"
            )


def _temporary(final: Path) -> Path:
    return final.with_name(f".{final.name}{TEMPORARY}")

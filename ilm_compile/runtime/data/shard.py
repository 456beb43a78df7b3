"""One token file, read: ``x.bin``, a line ``{"tokens": [...]}`` per document, beside its index.

Layout: InternEvo, tools/tokenizer.py. The file is mapped into memory; a document is parsed as JSON
when it is asked for, and nothing in the file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.shard_index import Int64, ShardIndex, index_path, read_index
from ilm_compile.runtime.data.shard_summary import NAME, Known


class TokenShard:
    """The documents of the token file at `path`.

    type_name: what kind of text it holds ("en", "code", ...). known: what a summary says of it; the
    file is then left alone until a document is read. Memory: 8 to 24 bytes a document.
    Raises `IlmCompileError` if file and index cannot belong together; what only reading can tell
    is raised by `tokens`.
    """

    def __init__(
        self, path: str | Path, *, type_name: str = "", known: Known | None = None
    ) -> None:
        self.path = Path(path)
        self.type_name = type_name
        self._known = known
        self._map: mmap.mmap | None = None
        self.num_bytes = self._size() if known is None else known.num_bytes
        #: (documents,) the number of tokens of each document, as the index has it.
        self.lengths: Int64 = self._index.lengths if known is None else known.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int, *, vocab_size: int) -> Int64:
        """The tokens of one document, those that are no target with a minus sign.

        Raises `IlmCompileError` naming the file and the offset if the file has changed since it was
        opened, the line is not ``{"tokens": [integers]}``, has another number of tokens or another
        checksum than the index says, or a token whose absolute value is not below `vocab_size`.
        """
        start, stop = (int(offset) for offset in self._index.starts[document : document + 2])
        line = self._bytes(start, stop)
        checksums = self._index.checksums
        if checksums is not None and zlib.crc32(line) != checksums[document]:
            raise self._wrong(
                document,
                f"a line with the checksum {checksums[document]:#x}",
                f"one with {zlib.crc32(line):#x}: the file is damaged",
            )
        if line.find(b"\n") != len(line) - 1:
            got = "several" if b"\n" in line else "a part of one"
            raise self._wrong(document, "one line", f"{got}: the index is not of this file")
        values = self._parse(document, line)
        if len(values) != self.lengths[document]:
            raise self._wrong(document, f"{self.lengths[document]} tokens", f"{len(values)}")
        if values and not -vocab_size < min(values) <= max(values) < vocab_size:
            wrong = next(v for v in values if not -vocab_size < v < vocab_size)
            raise self._wrong(
                document,
                f"tokens below the vocabulary size {vocab_size}",
                f"{str(wrong)[:30]} as token {values.index(wrong)}",
            )
        return np.array(values, dtype=np.int64)

    def close(self) -> None:
        """Give the mapping back; reading opens it again."""
        if self._map is not None:
            self._map.close()
            self._map = None

    @property
    def is_open(self) -> bool:
        """Whether the file is mapped."""
        return self._map is not None

    def digest(self) -> bytes:
        """A hash of the index and of the file's size."""
        if self._known is not None:
            return self._known.digest
        with index_path(self.path).open("rb") as file:
            index = hashlib.file_digest(file, "sha256").digest()
        return hashlib.sha256(index + str(self.num_bytes).encode()).digest()

    @cached_property
    def _index(self) -> ShardIndex:
        if (size := self._size()) != self.num_bytes:
            raise self._changed(f"{self.num_bytes} bytes", str(size))
        if size:
            self._check_end()
        index = read_index(self.path, size)
        if self._known is not None and not np.array_equal(index.lengths, self.lengths):
            raise self._changed(
                f"{len(self)} documents of {self.lengths.sum()} tokens",
                f"{len(index.lengths)} of {index.lengths.sum()}, or others",
            )
        return index

    def _size(self) -> int:
        try:
            return os.stat(self.path).st_size
        except OSError as error:
            raise IlmCompileError(
                f"token file: expected a readable file at {self.path}: {error.strerror}"
            ) from error

    def _changed(self, expected: str, got: str) -> IlmCompileError:
        return IlmCompileError(
            f"token file: expected {expected} in {self.path}, as the summary of its folder says, "
            f"got {got}; it was changed after that: remove {NAME} there, and start again"
        )

    def _bytes(self, start: int, stop: int) -> bytes:
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Reading a page that a truncation took away would end the process with SIGBUS.
        size = self._map.size()
        if size != self.num_bytes:
            raise IlmCompileError(
                f"token file: {self.path} had {self.num_bytes} bytes when it was opened and has "
                f"{size} now (read at offset {start}); do not change files that a run reads"
            )
        return self._map[start:stop]

    def _check_end(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self.num_bytes - 1)
            end = file.read(1)
        if end != b"\n":
            raise IlmCompileError(
                f"token file: expected the end of a line at offset {self.num_bytes - 1} of "
                f"{self.path}, got {end.decode('latin-1')!r}: the file is truncated"
            )

    def _parse(self, document: int, line: bytes) -> list[int]:
        expected = 'a line {"tokens": [integers]}'
        try:
            value: Any = json.loads(line.decode("utf-8"))
        except RecursionError as error:
            raise self._wrong(document, expected, "JSON nested too deeply") from error
        except ValueError as error:
            raise self._wrong(document, expected, str(error)) from error
        tokens = value.get("tokens") if isinstance(value, dict) else None
        if not isinstance(tokens, list) or not set(map(type, tokens)) <= {int}:
            raise self._wrong(document, expected, line[:60].decode("utf-8", "replace").strip())
        return tokens

    def _wrong(self, document: int, expected: str, got: str) -> IlmCompileError:
        offset = int(self._index.starts[document])
        return IlmCompileError(
            f"token file: expected {expected} at offset {offset} of {self.path} (document "
            f"{document}), got {got}"
        )

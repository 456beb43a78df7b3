"""Rows of packed documents, read from token files when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.dataset import IGNORED_LABEL, TYPE_IDS, Identity, identity_of
from ilm_compile.runtime.data.document_reader import DocumentReader
from ilm_compile.runtime.data.row_layout import PACKINGS
from ilm_compile.runtime.data.selection import LONG_DOCUMENTS, select
from ilm_compile.runtime.data.shard import TokenShard
from ilm_compile.runtime.data.shard_folder import check_type_ids, open_shards, type_ids
from ilm_compile.runtime.data.shard_index import Int64


class TokenDataset:
    """The documents of `shards`, packed into rows of `seq_len` tokens; a `RowDataset`.

    vocab_size: of the model; a larger token is an error when it is read.
    packing: "cut", a document goes on in the next row; "whole", a document is never cut; "window",
    rows of plain text without document boundaries (InternLM's pack_sample_into_one).
    max_documents: in one row; more are left for the next. None takes max(8, seq_len // 64), and 1
    for "window". One for both gives unpacked rows.
    max_document: of "cut", positions and boundaries begin anew after so many tokens of a document
    within a row; its targets go on. Each such piece counts as one of max_documents.
    long_documents: what "whole" does with one longer than a row: "refuse", "split", "truncate".
    min_length: shorter documents are left out, and empty ones always. min_length_by_type: other
    numbers for the types it names.
    shuffle_seed: documents are packed in an order drawn from it; None keeps that of the files.
    ids: the number of each type, for type_ids; None numbers the names in order.
    with_types: batches have type_ids.
    zero_is_target: False agrees with InternLM, which never learns token 0.
    learn_ends: False takes from rows of "window" the targets that follow the end of a document, and
    of the last of every `rows_of_a_pack` rows what follows its end, as InternLM does.
    padding: the token that fills rows up.

    A token stored with a minus sign is input, but no target (InternLM's tokenised SFT data).
    Memory: about 40 bytes a document and 8 a row; the tokens stay in the files.
    """

    def __init__(
        self,
        shards: Sequence[TokenShard],
        *,
        seq_len: int,
        vocab_size: int,
        packing: str = "cut",
        max_documents: int | None = None,
        max_document: int | None = None,
        long_documents: str = "refuse",
        min_length: int = 0,
        min_length_by_type: Mapping[str, int] | None = None,
        shuffle_seed: int | None = 0,
        ids: Mapping[str, int] | None = None,
        with_types: bool = False,
        zero_is_target: bool = True,
        learn_ends: bool = True,
        rows_of_a_pack: int = 1,
        padding: int = 0,
    ) -> None:
        if max_documents is None:
            max_documents = 1 if packing == "window" else max(8, seq_len // 64)
        _check_options(seq_len, vocab_size, max_documents, padding, packing, long_documents)
        self.shards = list(shards)
        self.type_ids = dict(type_ids(self.shards) if ids is None else ids)
        check_type_ids(self.shards, self.type_ids)
        self.seq_len, self.max_documents, self.packing = seq_len, max_documents, packing
        self._padding, self._max_document = padding, max_document
        num_cuts = 0 if max_document is None else seq_len // max_document
        if num_cuts and (packing != "cut" or num_cuts >= max_documents):
            raise IlmCompileError(
                f"token files: max_document={max_document} is for packing='cut' and more than "
                f"{num_cuts} documents a row, got {packing!r} and max_documents={max_documents}"
            )
        self._with_types, self._zero_is_target = with_types, zero_is_target
        self._learn_ends, self._rows_of_a_pack = learn_ends, rows_of_a_pack
        limit = long_documents if packing == "whole" else "split"
        chosen = select(
            self.shards,
            min_length=min_length,
            min_length_by_type=min_length_by_type or {},
            max_length=seq_len,
            long_documents=limit,
            shuffle_seed=shuffle_seed,
        )
        self._shard_of, self._document_of = chosen.shards, chosen.documents
        self._ends = np.cumsum(chosen.lengths)
        self._starts = PACKINGS[packing](self._ends, seq_len, max_documents - num_cuts)
        self.num_documents = len(chosen.lengths)
        self.num_tokens = int(self._ends[-1])
        least = (min_length, dict(min_length_by_type or {}))
        packed = (packing, max_documents, limit, shuffle_seed)
        ends = () if learn_ends else ("no ends", rows_of_a_pack)
        pieces = () if max_document is None else ("pieces", max_document)
        self._options = (*packed, zero_is_target, padding, *least, *ends, *pieces)
        self._reader = DocumentReader(self.shards, vocab_size=vocab_size)

    @classmethod
    def open(cls, folder: str | Path, **options: Any) -> Self:
        """The data set of every token file below `folder`; options as those of the class."""
        return cls(open_shards(folder), **options)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """See `RowDataset`. Raises `IlmCompileError` for a damaged file, naming it."""
        each = [self._row(int(row)) for row in rows]
        return {name: torch.from_numpy(np.stack([row[name] for row in each])) for name in each[0]}

    def identity(self) -> Identity:
        """See `RowDataset`. The fingerprint covers options, and names, sizes and indexes of files.

        The indexes that prepare-data writes hold the checksum of every document.
        """
        digest = hashlib.sha256(json.dumps(self._options, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(shard.path.name.encode() + b"\0" + shard.digest())
        return identity_of("token files", self, self.seq_len, digest.hexdigest())

    def outline(self) -> Identity:
        """`identity` by names, sizes and lengths alone, which are known without reading a file."""
        digest = hashlib.sha256(json.dumps(self._options, sort_keys=True).encode())
        for shard in self.shards:
            digest.update(shard.path.name.encode() + b"\0" + str(shard.num_bytes).encode())
            digest.update(shard.lengths.tobytes())
        return identity_of("token files", self, self.seq_len, digest.hexdigest())

    def close(self) -> None:
        """Unmap the files; reading maps them again."""
        self._reader.close()

    def _row(self, row: int) -> dict[str, Any]:
        """The arrays of one row, by name."""
        start, stop = int(self._starts[row]), int(self._starts[row + 1])
        first = int(self._ends.searchsorted(start, "right"))
        last = int(self._ends.searchsorted(stop))
        borders = np.array([start, *self._ends[first:last], stop]) - start
        is_window = self.packing == "window"
        learns_ends = is_window and self._learn_ends
        goes_on = stop < (self.num_tokens if learns_ends else self._ends[last])
        stream = self._stream(first, start, stop + goes_on)
        size = stop - start
        labels = np.full(self.seq_len, IGNORED_LABEL)
        following = stream[1:]
        is_target = following >= (0 if self._zero_is_target else 1)
        labels[: len(following)] = np.where(is_target, following, IGNORED_LABEL)
        starts = np.zeros(1, np.int64) if is_window else self._pieces(borders)
        if not learns_ends:
            labels[self._ends[first:last] - start - 1] = IGNORED_LABEL
            if is_window and (row + 1) % self._rows_of_a_pack == 0:
                labels[size - 1] = IGNORED_LABEL
        columns = np.arange(self.seq_len)
        boundaries = np.full(self.max_documents + 1, self.seq_len, np.int32)
        boundaries[: len(starts)] = starts
        arrays = {
            "input_ids": np.full(self.seq_len, self._padding),
            "labels": labels,
            "position_ids": columns - starts[starts.searchsorted(columns, "right") - 1],
            "cu_seqlens": boundaries,
        }
        arrays["input_ids"][:size] = np.abs(stream[:size])
        if self._with_types:
            arrays[TYPE_IDS] = self._types(first, last, borders)
        return arrays

    def _pieces(self, borders: Int64) -> Int64:
        """Where the documents between the borders begin, long ones again and again."""
        if self._max_document is None:
            return borders[:-1]
        pieces = [np.arange(*pair, self._max_document) for pair in pairwise(borders)]
        return np.concatenate(pieces)

    def _stream(self, document: int, start: int, stop: int) -> Int64:
        """The tokens at the positions [start, stop), of which `document` holds the first."""
        pieces, position = [], start
        while position < stop:
            begin = int(self._ends[document - 1]) if document else 0
            place = (int(self._shard_of[document]), int(self._document_of[document]))
            pieces.append(self._reader.tokens(*place)[position - begin : stop - begin])
            position, document = position + len(pieces[-1]), document + 1
        return np.concatenate(pieces)

    def _types(self, first: int, last: int, borders: Int64) -> Int64:
        numbers = [
            self.type_ids[self.shards[self._shard_of[document]].type_name]
            for document in range(first, last + 1)
        ]
        widths = np.diff(borders)
        widths[-1] += self.seq_len - borders[-1]
        return np.repeat(np.array(numbers, np.int64), widths)


def _check_options(
    seq_len: int,
    vocab_size: int,
    max_documents: int,
    padding: int,
    packing: str,
    long_documents: str,
) -> None:
    if min(seq_len, vocab_size, max_documents) < 1 or not 0 <= padding < vocab_size:
        raise IlmCompileError(
            "token files: expected seq_len, vocab_size and max_documents of at least 1 and a "
            f"padding token below vocab_size, got seq_len={seq_len}, vocab_size={vocab_size}, "
            f"max_documents={max_documents}, padding={padding}"
        )
    for name, value, known in (
        ("packing", packing, tuple(PACKINGS)),
        ("long_documents", long_documents, LONG_DOCUMENTS),
    ):
        if value not in known:
            raise IlmCompileError(
                f"token files: expected {name} to be one of {', '.join(known)}, got {value!r}"
            )
    if packing == "window" and max_documents != 1:
        raise IlmCompileError(
            f"token files: rows of packing='window' are one text each, got max_documents="
            f"{max_documents}; leave it out"
        )

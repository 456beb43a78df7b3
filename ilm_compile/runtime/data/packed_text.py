"""Texts in memory, packed into rows. No document and no token of a document is ever dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.dataset import IGNORED_LABEL, Identity, identity_of
from ilm_compile.runtime.data.tokenizer import ByteTokenizer, Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedText:
    """Rows of packed documents.

    input_ids, labels, position_ids: (rows, seq_len) int64. labels[r, t] is the token that follows
    input_ids[r, t] in the same document, IGNORED_LABEL after a document's end and on padding.
    cu_seqlens: (rows, max_documents + 1) int32: where each document of the row starts, then seq_len
    until the end of the row. Padding counts as the tail of the row's last document, which causal
    attention never sees.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The given rows as arguments of a model's forward."""
        return {
            "input_ids": self.input_ids[rows],
            "labels": self.labels[rows],
            "position_ids": self.position_ids[rows],
            "cu_seqlens": self.cu_seqlens[rows],
        }

    def identity(self) -> Identity:
        """See `RowDataset`; the fingerprint is that of the tokens and labels."""
        digest = hashlib.sha256()
        for tensor in (self.input_ids, self.labels, self.cu_seqlens):
            digest.update(tensor.contiguous().numpy().tobytes())
        return identity_of("packed text", self, self.input_ids.shape[1], digest.hexdigest())


def pack_documents(
    documents: Iterable[str],
    *,
    seq_len: int,
    max_documents: int = 8,
    tokenizer: Tokenizer | None = None,
) -> PackedText:
    """Lay the documents end to end into rows of `seq_len` tokens.

    A document that does not fit continues in the next row, its positions starting again at 0. A
    row that holds `max_documents` is closed and padded. tokenizer: bytes when None.
    """
    if seq_len < 1 or max_documents < 1:
        raise IlmCompileError(
            "pack_documents: seq_len and max_documents must be at least 1, "
            f"got seq_len={seq_len}, max_documents={max_documents}"
        )
    tokenizer = tokenizer or ByteTokenizer()
    rows: list[_Row] = []
    for document in documents:
        tokens = [*tokenizer.encode(document), tokenizer.end_of_document]
        labels = [*tokens[1:], IGNORED_LABEL]
        start = 0
        while start < len(tokens):
            if not rows or rows[-1].is_full(seq_len, max_documents):
                rows.append(_Row())
            stop = start + seq_len - len(rows[-1].tokens)
            rows[-1].append(tokens[start:stop], labels[start:stop])
            start = stop
    if not rows:
        raise IlmCompileError("pack_documents: expected at least one document, got none")
    return _stack([row.padded(seq_len, max_documents, tokenizer.padding) for row in rows])


class _Row:
    """One row while it is being filled."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.positions: list[int] = []
        self.starts: list[int] = []

    def is_full(self, seq_len: int, max_documents: int) -> bool:
        return len(self.tokens) == seq_len or len(self.starts) == max_documents

    def append(self, tokens: list[int], labels: list[int]) -> None:
        self.starts.append(len(self.tokens))
        self.tokens += tokens
        self.labels += labels
        self.positions += range(len(tokens))

    def padded(self, seq_len: int, max_documents: int, padding: int) -> PackedText:
        missing = seq_len - len(self.tokens)
        following = self.positions[-1] + 1
        boundaries = self.starts + [seq_len] * (max_documents + 1 - len(self.starts))
        return PackedText(
            input_ids=torch.tensor(self.tokens + [padding] * missing),
            labels=torch.tensor(self.labels + [IGNORED_LABEL] * missing),
            position_ids=torch.tensor([*self.positions, *range(following, following + missing)]),
            cu_seqlens=torch.tensor(boundaries, dtype=torch.int32),
        )


def _stack(rows: Sequence[PackedText]) -> PackedText:
    return PackedText(
        input_ids=torch.stack([row.input_ids for row in rows]),
        labels=torch.stack([row.labels for row in rows]),
        position_ids=torch.stack([row.position_ids for row in rows]),
        cu_seqlens=torch.stack([row.cu_seqlens for row in rows]),
    )

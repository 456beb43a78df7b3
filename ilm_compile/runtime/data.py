"""Text to batches: byte-level tokens, documents packed into rows, a resumable order of rows.

Nothing here depends on the rank or the plan: every rank sees the same global batches, and the
Trainer takes its slice. No document and no token of a document is ever dropped.
"""

import pydoc_data.topics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError

IGNORED_LABEL = -100


class Tokenizer(Protocol):
    """What packing asks of a tokenizer."""

    end_of_document: int
    padding: int

    def encode(self, text: str) -> list[int]: ...


class ByteTokenizer:
    """Tokens are the bytes of the text in UTF-8; two more mark a document's end and padding."""

    end_of_document = 256
    padding = 257
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the byte tokens; other tokens are left out, broken UTF-8 becomes U+FFFD."""
        return bytes(token for token in tokens if token < 256).decode("utf-8", errors="replace")


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


class BatchIterator:
    """Endless global batches of a dataset's rows, the same on every rank.

    The rows of epoch e come in an order drawn from (seed, e) alone; a batch that reaches the end of
    an epoch goes on into the next, so every row is seen once per epoch. The state is the number of
    rows taken: a run may resume with another batch size.
    """

    def __init__(self, dataset: PackedText, *, global_batch_size: int, seed: int = 0) -> None:
        if global_batch_size < 1 or seed < 0:
            raise IlmCompileError(
                "BatchIterator: global_batch_size must be at least 1 and seed at least 0, "
                f"got global_batch_size={global_batch_size}, seed={seed}"
            )
        self._dataset = dataset
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._rows_taken = 0
        self._order = self._epoch_order(0)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        rows: list[int] = []
        for _ in range(self._global_batch_size):
            rows.append(int(self._order[self._rows_taken % len(self._dataset)]))
            self._rows_taken += 1
            if self._rows_taken % len(self._dataset) == 0:
                self._order = self._epoch_order(self.epoch)
        return self._dataset.batch(torch.tensor(rows))

    @property
    def epoch(self) -> int:
        """How many times every row has been taken."""
        return self._rows_taken // len(self._dataset)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on with the next batch; JSON values only."""
        return {
            "seed": self._seed,
            "num_rows": len(self._dataset),
            "rows_taken": self._rows_taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the saved iterator stood; seed and dataset size must be the same."""
        expected = self.state_dict()
        for key in ("seed", "num_rows"):
            if state[key] != expected[key]:
                raise IlmCompileError(
                    f"BatchIterator.load_state_dict: saved with {key}={state[key]}, this iterator "
                    f"has {key}={expected[key]}; resume with the same data and seed"
                )
        self._rows_taken = state["rows_taken"]
        self._order = self._epoch_order(self.epoch)

    def _epoch_order(self, epoch: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        return np.random.default_rng((self._seed, epoch)).permutation(len(self._dataset))


def documents_from_pydoc() -> list[str]:
    """The Python language reference that comes with every interpreter, a document per topic."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def documents_from_files(paths: Iterable[str | Path]) -> list[str]:
    """The text of each file, in the given order. Errors: a path that is not a UTF-8 text file."""
    return [_read_text(Path(path)) for path in paths]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise IlmCompileError(
            f"documents_from_files: expected a readable text file at {path}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise IlmCompileError(
            f"documents_from_files: expected UTF-8 text in {path}, got byte "
            f"{error.object[error.start]:#04x} at offset {error.start}; convert it to UTF-8"
        ) from error

"""Random rows for runs without data: InternLM's behaviour when train_folder is None."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.dataset import IGNORED_LABEL, TYPE_IDS, Identity, identity_of
from ilm_compile.runtime.data.shard_index import Int64


class DummyDataset:
    """`num_rows` rows of random tokens, each a function of the seed and its number alone.

    A row holds one to `max_documents` documents of random length, or exactly one with
    `fixed_length`. with_types: batches have type_ids, all 0.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        seq_len: int,
        vocab_size: int,
        max_documents: int = 8,
        seed: int = 0,
        fixed_length: bool = False,
        with_types: bool = False,
    ) -> None:
        if min(num_rows, seq_len, vocab_size, max_documents) < 1 or seed < 0:
            raise IlmCompileError(
                "dummy data: expected num_rows, seq_len, vocab_size and max_documents of at least "
                f"1 and a seed of at least 0, got num_rows={num_rows}, seq_len={seq_len}, "
                f"vocab_size={vocab_size}, max_documents={max_documents}, seed={seed}"
            )
        self.seq_len, self.max_documents = seq_len, max_documents
        self.type_ids = {"random": 0}
        self._num_rows, self._vocab_size, self._seed = num_rows, vocab_size, seed
        self._fixed_length, self._with_types = fixed_length, with_types

    def __len__(self) -> int:
        return self._num_rows

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """See `RowDataset`."""
        each = [self._row(int(row)) for row in rows]
        batch = {name: torch.from_numpy(np.stack([r[name] for r in each])) for name in each[0]}
        if self._with_types:
            batch[TYPE_IDS] = torch.zeros_like(batch["input_ids"])
        return batch

    def identity(self) -> Identity:
        """See `RowDataset`."""
        numbers = (self._vocab_size, self.max_documents, self._seed, int(self._fixed_length))
        return identity_of("dummy data", self, self.seq_len, "-".join(map(str, numbers)))

    def _row(self, row: int) -> dict[str, Int64]:
        random = np.random.default_rng((self._seed, row))
        tokens = random.integers(self._vocab_size, size=self.seq_len)
        starts = np.zeros(1, np.int64)
        if not self._fixed_length:
            count = random.integers(min(self.max_documents, self.seq_len))
            inner = random.permutation(self.seq_len - 1)[:count] + 1
            starts = np.sort(np.append(starts, inner))
        labels = np.append(tokens[1:], IGNORED_LABEL)
        labels[starts[1:] - 1] = IGNORED_LABEL
        boundaries = np.full(self.max_documents + 1, self.seq_len, np.int32)
        boundaries[: len(starts)] = starts
        columns = np.arange(self.seq_len)
        return {
            "input_ids": tokens,
            "labels": labels,
            "position_ids": columns - starts[starts.searchsorted(columns, "right") - 1],
            "cu_seqlens": boundaries,
        }

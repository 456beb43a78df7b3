"""What every data set of rows offers, and what its rows look like.

The order of rows depends on no rank and no plan; of each batch a rank reads its part alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.batch import LocalBatch
from ilm_compile.runtime.data.keyed_order import Rows as IntArray

IGNORED_LABEL = -100
TYPE_IDS = "type_ids"

Identity = dict[str, int | str]


class RowDataset(Protocol):
    """Rows of `seq_len` tokens each, by number.

    A batch of n rows holds, as the arguments of a model's forward,

    * input_ids, labels, position_ids: (n, seq_len) int64. labels[r, t] is the token that follows
      input_ids[r, t], IGNORED_LABEL where there is none to learn. Positions start at 0 in every
      document of the row;
    * cu_seqlens: (n, max_documents + 1) int32: where each document of the row starts, then seq_len
      until the end of the row. Padding counts as the tail of the row's last document, which causal
      attention never sees;
    * type_ids, only if the data set was asked for them: (n, seq_len) int64, for the evaluation by
      type. It is no argument of a model.
    """

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The rows of these numbers: (n,) int64."""
        ...

    def identity(self) -> Identity:
        """What a position in this data set depends on: kind, num_rows, seq_len and fingerprint.

        Plain JSON values. Equal identities mean the same rows in the same places.
        """
        ...


def identity_of(kind: str, dataset: RowDataset, seq_len: int, fingerprint: str) -> Identity:
    """What `RowDataset.identity` returns."""
    return {
        **{"kind": kind, "num_rows": len(dataset)},
        **{"seq_len": seq_len, "fingerprint": fingerprint},
    }


def labels_in_place(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with each label beside its own token, as models want it that shift them.

    Hugging Face's do. The label of the token after the row's last is lost.
    """
    nothing = torch.full_like(batch["labels"][:, :1], IGNORED_LABEL)
    return {**batch, "labels": torch.cat([nothing, batch["labels"][:, :-1]], dim=1)}


@dataclass(frozen=True, slots=True)
class Part:
    """Part `rank` of `size` equal ones of every batch: that of a data-parallel rank."""

    rank: int = 0
    size: int = 1

    def of(self, num_rows: int) -> range:
        """Its places in a batch of `num_rows`. Raises `IlmCompileError` if it cannot be cut so."""
        if not 0 <= self.rank < self.size or num_rows % self.size:
            raise IlmCompileError(
                f"batches: expected a part of {num_rows} rows that can be cut into equal ones, got "
                f"part {self.rank} of {self.size}"
            )
        own = num_rows // self.size
        return range(own * self.rank, own * (self.rank + 1))


@dataclass(frozen=True, slots=True)
class Rows:
    """The numbers of a part's rows, of which those after the first `num_real` only fill it up.

    num_of_batch: rows of the whole batch, without such.
    """

    numbers: list[int]
    num_real: int
    num_of_batch: int

    @classmethod
    def of(cls, places: range, num_of_batch: int, at: Callable[[IntArray], IntArray]) -> Self:
        """Those at `places` of a batch of which `at` gives the rows; fillers are its first row."""
        wanted = np.array(places)
        is_real = wanted < num_of_batch
        numbers = at(np.where(is_real, wanted, 0))
        return cls(numbers.tolist(), int(is_real.sum()), num_of_batch)


def read_rows(dataset: RowDataset, rows: Rows) -> LocalBatch:
    """The batch of a part's rows."""
    batch = dataset.batch(torch.tensor(rows.numbers))
    batch["labels"][rows.num_real :] = IGNORED_LABEL
    return LocalBatch(batch)

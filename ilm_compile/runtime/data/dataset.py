"""What every data set of rows offers, and what its rows look like.

Nothing in this package depends on the rank or the plan: every rank sees the same global batches,
and the runtime takes its slice.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

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


def labels_in_place(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with each label beside its own token, as models want it that shift them.

    Hugging Face's do. The label of the token after the row's last is lost.
    """
    nothing = torch.full_like(batch["labels"][:, :1], IGNORED_LABEL)
    return {**batch, "labels": torch.cat([nothing, batch["labels"][:, :-1]], dim=1)}


def padded_batch(dataset: RowDataset, rows: list[int], size: int) -> dict[str, Tensor]:
    """The rows, and then copies of the first with no target, `size` rows in all."""
    batch = dataset.batch(torch.tensor(rows + rows[:1] * (size - len(rows))))
    batch["labels"][len(rows) :] = IGNORED_LABEL
    return batch

"""Which rows come next: a function of the seed and of how many were taken before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ilm_compile.runtime.data.batch_plan import BatchNumbers, BatchRamp
from ilm_compile.runtime.data.keyed_order import KeyedOrder

ORDER = "keyed-1"  # how epochs are ordered; another way is another name


class RowOrder:
    """The rows of every batch, one list after the other, without end.

    The rows of epoch e come in an order drawn from (seed, e) alone; a batch that reaches the end of
    an epoch goes on into the next. Batches in `skip` are passed over, their rows with them.
    """

    def __init__(
        self, num_rows: int, full: int, seed: int, ramp: BatchRamp | None, skip: BatchNumbers
    ) -> None:
        self._num_rows, self._full, self._seed = num_rows, full, seed
        self._ramp, self._skip = ramp, skip
        self.go_to(0, 0)

    def go_to(self, rows_taken: int, batches_taken: int) -> None:
        """Go on as if so many rows and batches had been taken."""
        self.rows_taken, self.batches_taken = rows_taken, batches_taken

    def copy(self) -> RowOrder:
        """One that goes on from here on its own."""
        other = RowOrder(self._num_rows, self._full, self._seed, self._ramp, self._skip)
        other.go_to(self.rows_taken, self.batches_taken)
        return other

    @property
    def epoch(self) -> int:
        """How many times every row has been taken."""
        return self.rows_taken // self._num_rows

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        while self.batches_taken in self._skip:
            self._take()
        return self._take()

    def _take(self) -> list[int]:
        batch, full = self.batches_taken, self._full
        left = full if self._ramp is None else self._ramp.rows(batch, full)
        rows: list[int] = []
        while left:
            start = self.rows_taken % self._num_rows
            count = min(left, self._num_rows - start)
            order = KeyedOrder(self._num_rows, self._seed, self.epoch)
            rows += order[np.arange(start, start + count)].tolist()
            self.rows_taken += count
            left -= count
        self.batches_taken += 1
        return rows

"""Which rows come next: a function of the seed and of how many were taken before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ilm_compile.runtime.data.batch_plan import BatchNumbers, BatchRamp


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
        self._order = self._epoch_order()

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
        rows: list[int] = []
        for _ in range(full if self._ramp is None else self._ramp.rows(batch, full)):
            rows.append(int(self._order[self.rows_taken % self._num_rows]))
            self.rows_taken += 1
            if self.rows_taken % self._num_rows == 0:
                self._order = self._epoch_order()
        self.batches_taken += 1
        return rows

    def _epoch_order(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.random.default_rng((self._seed, self.epoch)).permutation(self._num_rows)

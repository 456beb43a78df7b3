"""Which rows come next: a function of the seed and of how many were taken before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ilm_compile.runtime.data.batch_plan import BatchNumbers, BatchRamp
from ilm_compile.runtime.data.dataset import Part, Rows
from ilm_compile.runtime.data.keyed_order import KeyedOrder
from ilm_compile.runtime.data.keyed_order import Rows as IntArray

ORDER = "keyed-1"  # how epochs are ordered; another way is another name


class RowOrder:
    """The rows of a part of every batch of `full`, one batch after the other, without end.

    The rows of epoch e come in an order drawn from (seed, e) alone; a batch that reaches the end of
    an epoch goes on into the next. Batches in `skip` are passed over, their rows with them. One
    that the ramp makes smaller is filled up with copies of its first row, without targets.
    """

    def __init__(
        self,
        num_rows: int,
        full: int,
        seed: int,
        ramp: BatchRamp | None,
        skip: BatchNumbers,
        part: Part,
    ) -> None:
        self._num_rows, self._full, self._seed = num_rows, full, seed
        self._ramp, self._skip, self._part = ramp, skip, part
        self._places = part.of(full)
        self.go_to(0, 0)

    def go_to(self, rows_taken: int, batches_taken: int) -> None:
        """Go on as if so many rows and batches had been taken."""
        self.rows_taken, self.batches_taken = rows_taken, batches_taken

    def copy(self) -> RowOrder:
        """One that goes on from here on its own."""
        other = RowOrder(self._num_rows, self._full, self._seed, self._ramp, self._skip, self._part)
        other.go_to(self.rows_taken, self.batches_taken)
        return other

    @property
    def epoch(self) -> int:
        """How many times every row has been taken."""
        return self.rows_taken // self._num_rows

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        while self.batches_taken in self._skip:
            self._take()
        first, count = self._take()
        return Rows.of(self._places, count, lambda places: self._at(first + places))

    def _take(self) -> tuple[int, int]:
        """Where the next batch begins among all rows of all epochs, and how many it has."""
        first, full = self.rows_taken, self._full
        count = full if self._ramp is None else self._ramp.rows(self.batches_taken, full)
        self.rows_taken += count
        self.batches_taken += 1
        return first, count

    def _at(self, places: IntArray) -> IntArray:
        """The rows at places that count through all epochs."""
        epochs, rows = places // self._num_rows, places % self._num_rows
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            rows[own] = KeyedOrder(self._num_rows, self._seed, epoch)[rows[own]]
        return rows

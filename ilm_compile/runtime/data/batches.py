"""Rows to batches: in which order, how many, and where a run that stopped goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.agree import broadcast, exchange
from ilm_compile.runtime.batch import LocalBatch
from ilm_compile.runtime.data.batch_plan import BatchNumbers, BatchRamp
from ilm_compile.runtime.data.dataset import Identity, Part, RowDataset, Rows, read_rows
from ilm_compile.runtime.data.read_ahead import read_ahead
from ilm_compile.runtime.data.row_order import ORDER, RowOrder
from ilm_compile.runtime.data.token_dataset import TokenDataset
from ilm_compile.runtime.mesh import Mesh

_COUNTERS = ("rows_taken", "batches_taken")
WHOLE = Part()


class BatchIterator:
    """Endless batches of a dataset's rows: global ones, or a part of them.

    The rows of epoch e come in an order drawn from (seed, e) alone; a batch that reaches the end of
    an epoch goes on into the next, so every row is seen once per epoch. The state is the number of
    rows and batches taken: a run may resume with another batch size or number of ranks.

    ramp: the first batches have fewer rows. They are filled up with rows that have no target, since
    a compiled program takes one shape only: loss and gradients are those of the smaller batch, the
    time is that of the full one. skip: numbers of batches, from 0, whose rows are passed over; a
    text as "2-5,10" or `BatchNumbers`. num_workers: processes that read batches ahead; none when 0.
    part: which of each batch is read and given, `Part(mesh.dp.rank, mesh.dp.size)` for a rank of a
    parallel run; all of it by default. The state is the same for every part.
    """

    def __init__(
        self,
        dataset: RowDataset,
        *,
        global_batch_size: int,
        seed: int = 0,
        ramp: BatchRamp | None = None,
        skip: BatchNumbers | str = "",
        num_workers: int = 0,
        part: Part = WHOLE,
    ) -> None:
        if global_batch_size < 1 or seed < 0:
            raise IlmCompileError(
                "BatchIterator: global_batch_size must be at least 1 and seed at least 0, "
                f"got global_batch_size={global_batch_size}, seed={seed}"
            )
        if num_workers < 0:
            raise IlmCompileError(
                f"BatchIterator: expected num_workers of at least 0, got {num_workers}"
            )
        if ramp is not None and ramp.start > global_batch_size:
            raise IlmCompileError(
                f"BatchIterator: expected a ramp-up that starts at no more than the full "
                f"global_batch_size={global_batch_size} rows, got a start of {ramp.start} rows"
            )
        if len(dataset) == 0:
            raise IlmCompileError("BatchIterator: expected a dataset with rows, got an empty one")
        self._dataset = dataset
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._num_workers = num_workers
        numbers = BatchNumbers.parse(skip) if isinstance(skip, str) else skip
        self._order = RowOrder(len(dataset), global_batch_size, seed, ramp, numbers, part)
        self._is_whole = part.size == 1
        self._ahead: Iterator[LocalBatch] | None = None
        self.num_rows = 0  # of the last batch, without those that fill it up

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        """A `LocalBatch`, or a global batch where the part is all of it."""
        position = (self._order.rows_taken, self._order.batches_taken)
        if self._num_workers and self._ahead is None:
            self._ahead = read_ahead(
                self._dataset, self._order.copy(), num_workers=self._num_workers
            )
        rows = next(self._order)
        self.num_rows = rows.num_of_batch
        try:
            ahead = self._ahead
            batch = read_rows(self._dataset, rows) if ahead is None else next(ahead)
            return dict(batch) if self._is_whole else batch
        except BaseException:
            self._go_to(*position)  # a batch that nobody saw was not taken
            raise

    @property
    def epoch(self) -> int:
        """How many times every row has been taken."""
        return self._order.epoch

    @property
    def batches_taken(self) -> int:
        """How many batches have been drawn, those skipped among them."""
        return self._order.batches_taken

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on with the next batch; JSON values only."""
        return {
            "seed": self._seed,
            **self._identity,
            "order": ORDER,
            "rows_taken": self._order.rows_taken,
            "batches_taken": self._order.batches_taken,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the saved iterator stood.

        Raises `IlmCompileError`, with nothing changed, if `state` is not such a state or belongs
        to another seed or dataset (kind, number of rows, length, content).
        """
        expected = self.state_dict()
        if isinstance(state, dict) and set(state) == set(expected) - {"order"}:
            state = {**state, "order": "that of version 0.1"}
        if not isinstance(state, dict) or set(state) != set(expected):
            keys = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise IlmCompileError(
                f"BatchIterator.load_state_dict: expected the keys {sorted(expected)}, got {keys}; "
                "give what state_dict returned"
            )
        for key in (*self._identity, "seed", "order"):
            if state[key] != expected[key]:
                raise IlmCompileError(
                    f"BatchIterator.load_state_dict: saved with {key}={state[key]}, this iterator "
                    f"has {key}={expected[key]}; resume with the same data and seed"
                )
        for key in _COUNTERS:
            if type(state[key]) is not int or state[key] < 0:
                raise IlmCompileError(
                    f"BatchIterator.load_state_dict: expected a count of at least 0 as {key}, got "
                    f"{state[key]!r}"
                )
        self._go_to(state["rows_taken"], state["batches_taken"])

    def agree(self, mesh: Mesh) -> None:
        """Have rank 0 alone hash the data set, where the ranks see the same by names and sizes.

        Collective; without it each rank hashes its own for `state_dict`. Raises `IlmCompileError`
        on every rank if they see different ones.
        """
        data = self._dataset
        outline = data.outline() if isinstance(data, TokenDataset) else data.identity()
        digest = hashlib.sha256(json.dumps(outline, sort_keys=True).encode()).digest()[:6]
        found = [number for (number,) in exchange([float(int.from_bytes(digest))], mesh)]
        if others := [rank for rank, number in enumerate(found) if number != found[0]]:
            raise IlmCompileError(
                f"data: expected the same {outline['kind']} on all ranks, ranks {others} have "
                "others than rank 0 (names, sizes, lengths or options); give every node the same "
                "folder"
            )
        own = json.dumps(self._identity).encode() if mesh.rank == 0 else b""
        self._identity = json.loads(broadcast(own, mesh))

    def _go_to(self, rows_taken: int, batches_taken: int) -> None:
        self._order.go_to(rows_taken, batches_taken)
        self._ahead = None

    @cached_property
    def _identity(self) -> Identity:
        return self._dataset.identity()


class ValidationBatches:
    """Every row of a dataset once, in order, as often as it is iterated over.

    The last batch is filled up with rows that have no target. max_batches: stop after that many.
    part: as for `BatchIterator`.
    """

    def __init__(
        self,
        dataset: RowDataset,
        *,
        global_batch_size: int,
        max_batches: int | None = None,
        part: Part = WHOLE,
    ) -> None:
        if global_batch_size < 1 or (max_batches is not None and max_batches < 1):
            raise IlmCompileError(
                "ValidationBatches: global_batch_size and max_batches must be at least 1, got "
                f"global_batch_size={global_batch_size}, max_batches={max_batches}"
            )
        if len(dataset) == 0:
            raise IlmCompileError("ValidationBatches: expected a dataset with rows, got none")
        self.dataset = dataset
        self._global_batch_size = global_batch_size
        self._places, self._is_whole = part.of(global_batch_size), part.size == 1
        self._num_batches = -(-len(dataset) // global_batch_size)
        if max_batches is not None:
            self._num_batches = min(self._num_batches, max_batches)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        size = self._global_batch_size
        for batch in range(self._num_batches):
            start = batch * size
            count = min(size, len(self.dataset) - start)
            rows = Rows.of(self._places, count, partial(np.add, start))
            read = read_rows(self.dataset, rows)
            yield dict(read) if self._is_whole else read

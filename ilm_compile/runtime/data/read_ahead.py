"""Batches read by other processes while the model trains on earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.batch import LocalBatch
from ilm_compile.runtime.data.dataset import RowDataset, Rows, read_rows

PREFETCH = 2  # batches that each process is ahead


def read_ahead(
    dataset: RowDataset, rows: Iterable[Rows], *, num_workers: int
) -> Iterator[LocalBatch]:
    """Yield `read_rows` of each, in order, from `num_workers` forked processes.

    Forked: they share the index of the data set and start in milliseconds, and a script needs no
    ``if __name__`` for them. They end with the iterator. Raises what the reading raised.
    """
    loader: DataLoader[Any] = DataLoader(
        _Batches(dataset),  # type: ignore[arg-type]
        batch_size=None,
        sampler=rows,
        num_workers=num_workers,
        prefetch_factor=PREFETCH,
        collate_fn=_as_it_is,
        multiprocessing_context="fork",
    )
    for batch in loader:
        if isinstance(batch, IlmCompileError):
            raise batch
        yield batch


class _Batches:
    """Looked up by rows. An error is a result here: DataLoader would wrap a traceback."""

    def __init__(self, dataset: RowDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, rows: Rows) -> LocalBatch | IlmCompileError:
        try:
            return read_rows(self._dataset, rows)
        except IlmCompileError as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch

"""Where the rows begin in the stream that all documents, laid end to end, make.

Every function takes ``ends``, (documents,) int64, the position after each document, strictly
growing, and returns (rows + 1,) int64: row r holds the positions [starts[r], starts[r + 1]), at
most `seq_len` of them and of at most `max_documents` documents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ilm_compile.runtime.data.shard_index import Int64

LONGEST_BLOCK = 1 << 16


def cut(ends: Int64, seq_len: int, max_documents: int) -> Int64:
    """Full rows: a document that does not fit goes on in the next one.

    A row with too many documents ends early. In blocks, because such rows are few.
    """
    total = int(ends[-1])
    starts = [np.zeros(1, np.int64)]
    position, block = 0, 1
    while position < total:
        grid = np.minimum(position + seq_len * np.arange(block + 1), total)
        grid = grid[: int(grid.searchsorted(total)) + 1]
        first = ends.searchsorted(grid[:-1], "right")
        crowded = np.flatnonzero(ends.searchsorted(grid[1:]) - first >= max_documents)
        if crowded.size:
            good = int(crowded[0])
            closed = ends[first[good] + max_documents - 1]
            starts.append(np.append(grid[1 : good + 1], closed))
            block = 1
        else:
            starts.append(grid[1:])
            block = min(2 * block, LONGEST_BLOCK)
        position = int(starts[-1][-1])
    return np.concatenate(starts)


def whole(ends: Int64, seq_len: int, max_documents: int) -> Int64:
    """Rows of whole documents, as many as fit; only one longer than a row is cut."""
    total = int(ends[-1])
    starts, first = [0], 0
    while starts[-1] < total:
        limit = starts[-1] + seq_len
        fitting = min(int(ends.searchsorted(limit, "right")), first + max_documents)
        starts.append(int(ends[fitting - 1]) if fitting > first else limit)
        first = fitting
    return np.array(starts, np.int64)


def window(ends: Int64, seq_len: int, max_documents: int) -> Int64:
    """Full rows, whatever the documents: each row is one text."""
    total = int(ends[-1])
    return np.append(np.arange(0, total, seq_len), total)


PACKINGS: dict[str, Callable[[Int64, int, int], Int64]] = {
    "cut": cut,
    "whole": whole,
    "window": window,
}

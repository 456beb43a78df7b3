"""Cutting a row of costs into balanced runs, exactly, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Two sums of the same costs in another order differ by rounding; they count as equal.
_SLACK = 1 + 1e-9


def balance(costs: Sequence[float], num_runs: int) -> list[int]:
    """Return where the 2nd, 3rd, ... of `num_runs` runs of `costs` begins.

    The largest run is as small as it can be; among those divisions, the sum of squares is smallest,
    which evens out the other runs. No run is empty: needs ``num_runs <= len(costs)``.
    """
    ends = np.concatenate([[0.0], np.cumsum(costs)])
    size = len(ends)
    lengths = ends[None, :] - ends[:, None]  # [i, j]: cost of the run from i up to j
    lengths[np.tril_indices(size)] = np.inf

    smallest = lengths[0]
    for _ in range(num_runs - 1):
        smallest = np.maximum(smallest[:, None], lengths).min(axis=0)

    squares = np.where(lengths <= smallest[-1] * _SLACK, lengths**2, np.inf)
    total, begins = squares[0], []
    for _ in range(num_runs - 1):
        options = total[:, None] + squares
        begins.append(options.argmin(axis=0))
        total = options.min(axis=0)

    cuts, end = [], size - 1
    for begin in reversed(begins):
        end = int(begin[end])
        cuts.append(end)
    return cuts[::-1]

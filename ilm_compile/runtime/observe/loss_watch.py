"""Notices a loss that jumps."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_MIN_LOSSES = 3


class LossWatch:
    """Compares each loss with the median of the last `window` ones.

    A ratio to the last loss alone (InternEvo internlm/monitor) misses a rise over a few steps, and
    calls it a spike when one lucky batch is followed by an ordinary one.
    """

    def __init__(self, ratio: float, window: int = 10) -> None:
        self._ratio = ratio
        self._losses: deque[float] = deque(maxlen=window)

    def update(self, loss: float) -> float | None:
        """Take note of a loss; returns the median that it exceeds by the ratio, else None."""
        if not math.isfinite(loss):
            return None
        usual = median(self._losses) if len(self._losses) >= _MIN_LOSSES else math.inf
        self._losses.append(loss)
        return usual if loss > self._ratio * usual else None

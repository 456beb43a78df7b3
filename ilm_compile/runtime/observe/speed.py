"""How fast training is: averages over the last steps, and what share of the hardware that is."""

from __future__ import annotations

import math
import time
from collections import deque

from ilm_compile.runtime.metrics import StepMetrics

WINDOWS = (10, 50)


class Speed:
    """Figures that need more than one step, or the hardware.

    peak_flops: operations per second of one device at best, as its maker gives them for the dtype
    of the matrix products. hardware_flops: operations of one step of the whole job with those that
    are computed twice. Either may be unknown (None): what needs it is then left out.
    """

    def __init__(
        self, world_size: int, *, peak_flops: float | None, hardware_flops: float | None
    ) -> None:
        self._world_size = world_size
        self._peak_flops = peak_flops
        self._hardware_flops = hardware_flops
        self._recent: deque[tuple[int, float]] = deque(maxlen=max(WINDOWS))  # tokens, seconds
        self._ends: deque[float] = deque([time.monotonic()], maxlen=max(WINDOWS) + 1)

    def update(self, metrics: StepMetrics) -> dict[str, float]:
        """Take note of a step; returns the figures by name.

        tokens_per_second_per_rank_10, _50: over the last steps, all their tokens by all their time.
        mfu: model FLOPs utilisation, the operations that the model needs, nothing computed twice,
        as a share of the peak (Chowdhery et al., arXiv 2204.02311, appendix B). hfu: the share with
        what was computed twice (Korthikanti et al., arXiv 2205.05198, section 6.3).
        """
        self._recent.append((metrics.num_tokens, metrics.step_time_s))
        self._ends.append(time.monotonic())
        figures = {
            f"tokens_per_second_per_rank_{window}": self._average(window) for window in WINDOWS
        }
        if self._peak_flops is not None:
            peak = self._peak_flops * self._world_size
            if math.isfinite(metrics.model_flops_per_second):
                figures["mfu"] = metrics.model_flops_per_second / peak
            if self._hardware_flops is not None:
                figures["hfu"] = self._hardware_flops / metrics.step_time_s / peak
        return figures

    def seconds_left(self, num_steps: int) -> float:
        """What `num_steps` more steps will take at the pace of the last ones, pauses included."""
        num_seen = len(self._ends) - 1
        return num_steps * (self._ends[-1] - self._ends[0]) / num_seen if num_seen else math.nan

    def _average(self, window: int) -> float:
        recent = list(self._recent)[-window:]
        seconds = sum(time for _, time in recent)
        return sum(tokens for tokens, _ in recent) / seconds / self._world_size

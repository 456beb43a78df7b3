"""The loss scale of float16 training.

float16 has no gradients below 6e-8. So the loss is multiplied by a scale before the backward, the
gradients are divided by it before they are used, and the scale follows what they bear: down when
they overflow, up again after a while without. bfloat16 has the range of float32 and needs none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ilm_compile.errors import IlmCompileError


class LossScaler:
    """A dynamic loss scale. The names and their meaning are those of InternLM's `grad_scaler`.

    growth_interval: steps in a row without overflow before the scale grows by `growth_factor`.
    hysteresis: overflows that are needed before the scale shrinks by `backoff_factor`; those
    beyond shrink it at once, until it has grown again. The scale stays in [min_scale, max_scale].
    Raises `IlmCompileError` for values with which it could not work.
    """

    def __init__(
        self,
        *,
        initial_scale: float = 2.0**16,
        min_scale: float = 1.0,
        growth_interval: int = 1000,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        max_scale: float = 2.0**24,
        hysteresis: int = 2,
    ) -> None:
        scales = (min_scale, initial_scale, max_scale)
        _require(
            0 < min_scale <= initial_scale <= max_scale < math.inf,
            f"expected 0 < min_scale <= initial_scale <= max_scale, got {scales}",
        )
        _require(growth_interval >= 1, f"growth_interval must be 1 or above, got {growth_interval}")
        _require(growth_factor > 1, f"growth_factor must be above 1, got {growth_factor}")
        _require(0 < backoff_factor < 1, f"backoff_factor must lie in (0, 1), got {backoff_factor}")
        _require(hysteresis >= 1, f"hysteresis must be 1 or above, got {hysteresis}")
        self.scale = float(initial_scale)
        self.min_scale = min_scale
        self.growth_interval = growth_interval
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.max_scale = max_scale
        self.hysteresis = hysteresis
        self._num_good = 0  # steps in a row without overflow
        self._num_overflows = 0  # since the scale last grew

    def update(self, *, overflowed: bool) -> None:
        """Take note of a step; `scale` is then that of the next one."""
        if overflowed:
            self._num_good = 0
            self._num_overflows += 1
            if self._num_overflows >= self.hysteresis:
                self.scale = max(self.min_scale, self.scale * self.backoff_factor)
            return
        self._num_good += 1
        if self._num_good == self.growth_interval:
            self._num_good = self._num_overflows = 0
            self.scale = min(self.max_scale, self.scale * self.growth_factor)

    def state_dict(self) -> dict[str, float]:
        """The scale and its counters; the rest is the config's."""
        return {
            "scale": self.scale,
            "num_good": self._num_good,
            "num_overflows": self._num_overflows,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on where `state` was taken."""
        self.scale = float(state["scale"])
        self._num_good = int(state["num_good"])
        self._num_overflows = int(state["num_overflows"])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IlmCompileError(f"grad_scaler: {message}")

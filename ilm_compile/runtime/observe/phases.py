"""When a rank did what in the rest of a step, after the schedule: as the watchdog is told of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from ilm_compile.runtime.guard.activity import ACTIVITY

# What the activity is called -> the words of a picture, and its colour.
PHASES: Mapping[str, tuple[str, str]] = {
    "gradients": ("gradient reduction", "#3f8f6b"),
    "loss": ("loss", "#c2a83e"),
    "gradient norm": ("gradient norm", "#9aa5b1"),
    "optimizer": ("optimizer", "#6b5b95"),
}


@dataclass
class PhaseWatch:
    """Listens to the activity from `start` to `stop`, on CUDA waiting for the work of each part."""

    device: torch.device
    _moments: list[tuple[str, float]] = field(default_factory=list)

    def start(self) -> None:
        """From here on every change costs a look at the clock."""
        self._moments = []
        ACTIVITY.watcher = self._note

    def stop(self) -> None:
        """The last part ends here."""
        self._note("")
        ACTIVITY.watcher = None

    def spans(self) -> list[tuple[float, float]]:
        """Start and end of each of `PHASES` by `time.perf_counter`; (0, 0) for what was not."""
        found = {name: (a, b) for (name, a), (_, b) in pairwise(self._moments) if name in PHASES}
        return [found.get(name, (0.0, 0.0)) for name in PHASES]

    def _note(self, action: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._moments.append((action, time.perf_counter()))


def named(spans: Sequence[tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """The spans of those phases that there were."""
    return {name: s for name, s in zip(PHASES, spans, strict=True) if s[1] > s[0]}

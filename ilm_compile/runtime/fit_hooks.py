"""The keywords of `Trainer.fit` as a hook: a file of metrics, a progress bar, a function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ilm_compile.runtime.hooks import Hook
from ilm_compile.runtime.metrics import MetricsWriter, Progress, StepMetrics

if TYPE_CHECKING:
    from ilm_compile.runtime.trainer import Trainer

Tell = Callable[[StepMetrics], object]


@dataclass
class FitKeywords(Hook):
    """Tells of every step: a file and a progress bar on rank 0, and `callback` on every rank."""

    metrics_path: str | Path | None
    progress: bool
    callback: Tell | None
    _told: list[Tell] = field(default_factory=list)
    _opened: ExitStack = field(default_factory=ExitStack)

    def on_start(self, trainer: Trainer) -> None:
        if trainer.parallel.mesh.rank == 0:
            if self.metrics_path is not None:
                writer = self._opened.enter_context(MetricsWriter(self.metrics_path))
                self._told.append(writer.write)
            if self.progress:
                bar = self._opened.enter_context(Progress(trainer.total_steps))
                self._told.append(bar.update)
        if self.callback is not None:
            self._told.append(self.callback)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        for tell in self._told:
            tell(metrics)

    def on_stop(self, trainer: Trainer) -> None:
        self._opened.close()

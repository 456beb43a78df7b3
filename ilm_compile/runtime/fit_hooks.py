"""The keywords of `Trainer.fit` as hooks: a file of metrics, a progress bar, a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ilm_compile.runtime.hooks import Hook
from ilm_compile.runtime.metrics import MetricsWriter, Progress, StepMetrics

if TYPE_CHECKING:
    from ilm_compile.runtime.trainer import Trainer


class MetricsFile(Hook):
    """Appends the metrics of every step to a file as JSON lines, on rank 0."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._writer: MetricsWriter | None = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.parallel.mesh.rank == 0:
            self._writer = MetricsWriter(self._path)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._writer is not None:
            self._writer.write(metrics)

    def on_stop(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()


class ProgressBar(Hook):
    """Shows how far training is, on rank 0; see `Progress`."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._progress = Progress(trainer.total_steps, rank=trainer.parallel.mesh.rank)
        self._progress.__enter__()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._progress is not None:
            self._progress.update(metrics)

    def on_stop(self, trainer: Trainer) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)


class Callback(Hook):
    """Calls a function with the metrics of every step, on every rank."""

    def __init__(self, function: Callable[[StepMetrics], None]) -> None:
        self._function = function

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._function(metrics)


def fit_hooks(
    *,
    metrics_path: str | Path | None,
    progress: bool,
    callback: Callable[[StepMetrics], None] | None,
) -> list[Hook]:
    """The hooks that these keywords of `Trainer.fit` ask for."""
    hooks: list[Hook] = []
    if metrics_path is not None:
        hooks.append(MetricsFile(metrics_path))
    if progress:
        hooks.append(ProgressBar())
    if callback is not None:
        hooks.append(Callback(callback))
    return hooks

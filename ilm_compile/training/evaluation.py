"""Evaluates on the validation sets while training goes on."""

from __future__ import annotations

from collections.abc import Mapping

from ilm_compile.runtime import Hook, StepMetrics, Trainer
from ilm_compile.runtime.evaluation import evaluate
from ilm_compile.runtime.observe import Logger
from ilm_compile.training.data import Batches


class Evaluation(Hook):
    """Every `every` steps, and after the last one, tells `logger` of each of `sets` by name."""

    def __init__(self, sets: Mapping[str, Batches], logger: Logger, *, every: int) -> None:
        self._sets = sets
        self._logger = logger
        self._every = every
        self.last: dict[str, dict[str, float]] = {}  # metrics of the last evaluation, by set

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        is_last = metrics.step == trainer.total_steps
        if metrics.step % self._every and not is_last:
            return
        for name, batches in self._sets.items():
            self.last[name] = evaluate(trainer.parallel, batches)
            self._logger.log(f"valid/{name}", metrics.step, self.last[name])

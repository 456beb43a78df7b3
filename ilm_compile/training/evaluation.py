"""Evaluates on the validation sets, while training goes on too."""

from __future__ import annotations

from collections.abc import Mapping

from ilm_compile.runtime import Hook, Parallel, StepMetrics, Trainer
from ilm_compile.runtime.evaluation import evaluate
from ilm_compile.runtime.observe import Logger
from ilm_compile.training.data import Batches


def evaluate_sets(parallel: Parallel, sets: Mapping[str, Batches]) -> dict[str, dict[str, float]]:
    """The metrics of each set by its name; see `runtime.evaluation.evaluate`. Collective."""
    return {name: evaluate(parallel, batches) for name, batches in sets.items()}


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
        self.last = evaluate_sets(trainer.parallel, self._sets)
        for name, values in self.last.items():
            self._logger.log(f"valid/{name}", metrics.step, values)

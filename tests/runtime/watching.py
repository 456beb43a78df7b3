"""A small training to be watched, and what goes wrong in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Hook, StepMetrics, Trainer
from ilm_compile.runtime.observe.sinks import Alert
from tests.runtime.handmade import ROWS, make_batch, make_model, make_parallel


@dataclass
class Kept:
    """A sink that keeps what it gets."""

    alerts: list[Alert] = field(default_factory=list)

    def send(self, alert: Alert) -> None:
        self.alerts.append(alert)

    def kinds(self) -> list[str]:
        return [alert.kind for alert in self.alerts]


def train(
    *hooks: Hook, plan: Plan | None = None, num_steps: int = 3, **keywords: Any
) -> tuple[Trainer, list[StepMetrics]]:
    plan = plan or Plan(num_microbatches=2)
    trainer = Trainer(make_parallel(plan, make_model()), hooks=hooks, **keywords)
    rows = ROWS * plan.num_microbatches * trainer.parallel.mesh.dp.size
    batches = [make_batch(rows, seed=seed) for seed in range(num_steps)]
    return trainer, trainer.fit(batches, num_steps, progress=False)


@dataclass
class At(Hook):
    """Does something at the start of one step."""

    step: int
    action: Callable[[Trainer], None]

    def on_step_start(self, trainer: Trainer, step: int) -> None:
        if step == self.step:
            self.action(trainer)


def spoil_loss(trainer: Trainer) -> None:
    module = trainer.parallel.stages[-1].module
    module.register_forward_hook(lambda m, a, outputs: (outputs[0] * torch.nan, *outputs[1:]))


def fail(trainer: Trainer) -> None:
    raise ValueError("the disk is on fire")

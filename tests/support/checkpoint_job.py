"""A small training with a checkpoint manager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Parallel, adamw
from ilm_compile.runtime.checkpoint import CheckpointManager
from tests.runtime.handmade import make_batch, make_model, make_parallel


class Counter:
    """A state of one number."""

    def __init__(self, value: Any = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Job:
    """A hand-lowered model with an optimizer, a state and a manager."""

    def __init__(
        self,
        folder: str | Path,
        *,
        plan: Plan | None = None,
        seed: int = 3,
        lr: float = 0.1,
        **options: Any,
    ) -> None:
        self.parallel: Parallel = make_parallel(plan or Plan(), make_model(seed=seed))
        self.optimizer = adamw(self.parallel.named_parameters(), lr=lr)
        self.counter = Counter()
        options = {"optimizer": self.optimizer, "states": {"counter": self.counter}} | options
        self.manager = CheckpointManager(folder, self.parallel, **options)

    def step(self) -> float:
        self.parallel.zero_grad()
        loss = self.parallel.execute_schedule(make_batch(2))
        self.optimizer.step()
        self.counter.value += 1
        assert isinstance(loss, Tensor)
        return loss.item()

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last + 1):
            losses.append(self.step())
            if self.manager.after_step(step):
                break
        self.manager.close()
        return losses

    def weights(self) -> dict[str, Tensor]:
        return self.parallel.full_state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)

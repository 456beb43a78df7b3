"""Training that is saved under one plan and goes on under another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ilm_compile
from ilm_compile.runtime.checkpoint import CheckpointManager
from ilm_compile.runtime.optimizer import Beta2Scheduler, adamw, lr_schedule
from tests.support.promote import promoted_float32
from tests.support.tiny_model import SEQ, TinyTransformer
from tests.support.traced import traced_once

VOCAB = 33  # two ranks do not divide it: the compiler pads the embedding
ROWS = 4  # of a global batch, one per micro-batch: what dropout depends on is equal in all plans
PLANS: dict[str, dict[str, Any]] = {
    "single": {"num_microbatches": 4},
    "tp2": {"tp": 2, "num_microbatches": 4},
    "cp2": {"cp": 2, "num_microbatches": 4},
    "ep2": {"ep": 2, "num_microbatches": 4},
    "pp2": {"pp": 2, "num_microbatches": 4},
    "dp2-zero1": {"num_microbatches": 2, "zero": 1},
    "dp2-zero3": {"num_microbatches": 2, "zero": 3},
    "pp2-chunks2": {"pp": 2, "num_chunks": 2, "num_microbatches": 4},
    "tp2-pp2": {"tp": 2, "pp": 2, "num_microbatches": 4},
}
WORLD_SIZES = {name: 2 for name in PLANS} | {"single": 1, "tp2-pp2": 4}
NUM_STEPS = 3


class Stream:
    """Endless batches of random tokens, as a function of how many were taken."""

    def __init__(self) -> None:
        self.num_taken = 0

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.num_taken)
        self.num_taken += 1
        tokens = torch.randint(0, VOCAB, (2, ROWS, SEQ), generator=generator)
        labels = tokens[1].clone()
        labels[:, : self.num_taken % SEQ] = -100  # every step has another number of targets
        return {"input_ids": tokens[0], "labels": labels}

    def state_dict(self) -> dict[str, int]:
        return {"num_taken": self.num_taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_taken = state["num_taken"]


class Run:
    """A job under one plan. seed: of the initial weights, which a resumed run must not keep."""

    def __init__(self, plan: str, *, seed: int) -> None:
        torch.manual_seed(seed)
        model = TinyTransformer(vocab=VOCAB, tied=True, dropout=0.1, experts=True).double()
        example = {name: ((1, SEQ), torch.int64) for name in ("input_ids", "labels")}
        with promoted_float32(), traced_once("tied, with dropout"):
            parallel = ilm_compile.parallelize(model, example_inputs=example, **PLANS[plan])
        self.parallel = parallel
        self.stream = Stream()
        # Numbers that a resumed run must not keep either: the rate and beta2 of the first step.
        self.trainer = ilm_compile.Trainer(
            parallel,
            optimizer=adamw(parallel.named_parameters(), lr=0.01),
            lr_scheduler=lambda o: lr_schedule(o, warmup_steps=4, total_steps=2 * NUM_STEPS),
            beta2_scheduler=lambda o: Beta2Scheduler(o, init_beta2=0.5, c=0.8),
            max_grad_norm=0.5,
        )

    def manager(self, folder: str | Path, **options: Any) -> CheckpointManager:
        states = {"trainer": self.trainer, "sampler": self.stream}
        return CheckpointManager(
            folder, self.parallel, optimizer=self.trainer.optimizer, states=states, **options
        )

    def train(self, num_steps: int, manager: CheckpointManager | None = None) -> list[float]:
        """The losses of the next steps; `manager` saves after the last."""
        self.trainer.hooks = [] if manager is None else [manager]
        with promoted_float32():
            history = self.trainer.fit(self.stream, num_steps, progress=False)
        return [metrics.loss for metrics in history]

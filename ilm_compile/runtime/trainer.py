"""The training loop: a `Parallel`, an optimizer, a learning rate, and what is told about a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.batch import Batch
from ilm_compile.runtime.metrics import MetricsWriter, Progress, StepMetrics
from ilm_compile.runtime.optimizer import adamw
from ilm_compile.runtime.parallel import Parallel, Result


class Trainer:
    """Trains `parallel`: `zero_grad`, `execute_schedule` and `step` by hand, or `fit`.

    optimizer: over ``parallel.named_parameters()``; AdamW with rate `lr` when None.
    lr_scheduler: one for that optimizer, or a function that makes one of the optimizer.
    max_grad_norm: gradients are scaled down to this global norm; None leaves them alone.
    """

    def __init__(
        self,
        parallel: Parallel,
        *,
        optimizer: Optimizer | None = None,
        lr: float = 3e-4,
        lr_scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise IlmCompileError(f"Trainer: max_grad_norm must be above 0, got {max_grad_norm}")
        self.parallel = parallel
        self.optimizer = optimizer or _default_optimizer(parallel, lr)
        if callable(lr_scheduler):
            lr_scheduler = lr_scheduler(self.optimizer)
        self.lr_scheduler = lr_scheduler
        self.max_grad_norm = max_grad_norm
        self.num_skipped_steps = 0

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.parallel.zero_grad()

    def execute_schedule(
        self,
        batch: Batch,
        *,
        forward_only: bool = False,
        return_loss: bool = True,
        return_output_label: bool = False,
    ) -> Result:
        """Forward and backward of the global batch; see `Parallel.execute_schedule`."""
        return self.parallel.execute_schedule(
            batch,
            forward_only=forward_only,
            return_loss=return_loss,
            return_output_label=return_output_label,
        )

    def step(self) -> float:
        """Clip the gradients and update the parameters; returns the gradient norm before clipping.

        A norm that is not finite skips the update and the learning rate's step, on all ranks alike.
        """
        if self.max_grad_norm is None:
            norm = self.parallel.grad_norm().item()
        else:
            norm = self.parallel.clip_grad_norm_(self.max_grad_norm).item()
        if not math.isfinite(norm):
            self.num_skipped_steps += 1
            return norm
        self.optimizer.step()
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        return norm

    def fit(
        self,
        batches: Iterable[Batch],
        num_steps: int,
        *,
        metrics_path: str | Path | None = None,
        progress: bool = True,
        callback: Callable[[StepMetrics], None] | None = None,
    ) -> list[StepMetrics]:
        """Train for `num_steps` batches and return the metrics of each step.

        Rank 0 appends them as JSON lines to `metrics_path` and shows the progress. callback: called
        with them on every rank after each step. Raises `IlmCompileError` if the batches run out.
        """
        rank = self.parallel.mesh.rank
        history: list[StepMetrics] = []
        with ExitStack() as stack:
            sinks = [history.append]
            if metrics_path is not None and rank == 0:
                sinks.append(stack.enter_context(MetricsWriter(metrics_path)).write)
            if progress:
                sinks.append(stack.enter_context(Progress(num_steps, rank=rank)).update)
            if callback is not None:
                sinks.append(callback)
            for batch in islice(batches, num_steps):
                metrics = self._step_on(batch, len(history) + 1)
                for sink in sinks:
                    sink(metrics)
        if len(history) < num_steps:
            raise IlmCompileError(
                f"Trainer.fit: expected {num_steps} batches, got {len(history)}; give an endless "
                "iterator (BatchIterator is one) or fewer steps"
            )
        return history

    def _step_on(self, batch: Batch, step: int) -> StepMetrics:
        start = time.perf_counter()
        lr = self.optimizer.param_groups[0]["lr"]
        self.zero_grad()
        loss = self.execute_schedule(batch)
        assert isinstance(loss, Tensor)
        grad_norm = self.step()
        if loss.device.type == "cuda":
            torch.cuda.synchronize(loss.device)
        flops = self.parallel.model_flops
        return StepMetrics.measured(
            step=step,
            loss=loss.item(),
            grad_norm=grad_norm,
            lr=float(lr),
            num_tokens=next(iter(batch.values())).numel(),
            model_flops=math.nan if flops is None else flops,
            step_time_s=time.perf_counter() - start,
            world_size=self.parallel.mesh.world_size,
        )


def _default_optimizer(parallel: Parallel, lr: float) -> Optimizer:
    optimizer = adamw(parallel.named_parameters(), lr=lr)
    for group in optimizer.param_groups:
        # A loop over DTensors, torch's choice on the CPU, takes five times as long as one over
        # their local tensors; the foreach kernels take the same time for both.
        group["foreach"] = True
    return optimizer

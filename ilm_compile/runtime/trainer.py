"""The training loop: a `Parallel`, an optimizer, its schedules, and the hooks around every step."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ilm_compile.errors import IlmCompileError, NoTargetsError
from ilm_compile.runtime.agree import exchange
from ilm_compile.runtime.batch import Batch, LocalBatch
from ilm_compile.runtime.fit_hooks import FitKeywords
from ilm_compile.runtime.guard.activity import ACTIVITY
from ilm_compile.runtime.hooks import Hook, Hooks
from ilm_compile.runtime.metrics import StepMetrics
from ilm_compile.runtime.optimizer import Beta2Scheduler, LossScaler, adamw
from ilm_compile.runtime.parallel import Parallel, Result

SCALER = "scaler"
MAX_HISTORY = 10_000  # steps whose metrics `fit` returns


class Trainer:
    """Trains `parallel`: `zero_grad`, `execute_schedule` and `step` by hand, or `fit`.

    optimizer: over ``parallel.named_parameters()``; AdamW with rate `lr` when None.
    lr_scheduler: one for that optimizer, or a function that makes one of the optimizer.
    beta2_scheduler: of the optimizer's second beta, if any. scaler: the loss scale of float16
    training; bfloat16 and float32 need none. max_grad_norm: gradients are scaled down to this
    global norm; None leaves them alone. max_skips: so many steps in a row whose loss or gradients
    are not finite are an error. hooks: told of every step of `fit`, in this order.

    num_steps: steps taken, skipped ones included; num_skipped_steps; num_tokens: consumed by them,
    padding included. All three survive `state_dict`.
    """

    def __init__(
        self,
        parallel: Parallel,
        *,
        optimizer: Optimizer | None = None,
        lr: float = 3e-4,
        lr_scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
        beta2_scheduler: Beta2Scheduler | Callable[[Optimizer], Beta2Scheduler] | None = None,
        scaler: LossScaler | None = None,
        max_grad_norm: float | None = 1.0,
        max_skips: int = 100,
        hooks: Sequence[Hook] = (),
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise IlmCompileError(f"Trainer: max_grad_norm must be above 0, got {max_grad_norm}")
        if max_skips < 1:
            raise IlmCompileError(f"Trainer: max_skips must be 1 or above, got {max_skips}")
        if not any(variable.requires_grad for variable in parallel.saved_variables().values()):
            raise IlmCompileError(
                "Trainer: expected at least one parameter with requires_grad, got none on any "
                "rank; call requires_grad_() on what shall be trained before parallelize"
            )
        self.parallel = parallel
        self.optimizer = optimizer or adamw(parallel.named_parameters(), lr=lr)
        if callable(lr_scheduler):
            lr_scheduler = lr_scheduler(self.optimizer)
        if callable(beta2_scheduler):
            beta2_scheduler = beta2_scheduler(self.optimizer)
        self.lr_scheduler = lr_scheduler
        self.beta2_scheduler = beta2_scheduler
        self.scaler = scaler
        self.max_grad_norm = max_grad_norm
        self.max_skips = max_skips
        self.hooks = list(hooks)
        self.num_steps = 0
        self.num_skipped_steps = 0
        self.num_tokens = 0
        self.total_steps = 0
        self.stop_reason: str | None = None
        self._num_skips_in_a_row = 0
        self._stop_wish: str | None = None

    @property
    def loss_scale(self) -> float:
        """What the gradients of the next step are multiplied by until `step` divides it out."""
        return 1.0 if self.scaler is None else self.scaler.scale

    def train(self, mode: bool = True) -> Self:
        """Switch to training (dropout on), or to evaluation if not `mode`."""
        self.parallel.train(mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation: dropout off."""
        return self.train(False)

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
        batch_is_local: bool = False,
    ) -> Result:
        """Forward and backward of the global batch; see `Parallel.execute_schedule`."""
        return self.parallel.execute_schedule(
            batch,
            forward_only=forward_only,
            return_loss=return_loss,
            return_output_label=return_output_label,
            loss_scale=self.loss_scale,
            batch_is_local=batch_is_local,
        )

    def step(self) -> float:
        """Clip the gradients and update the parameters; returns the gradient norm before clipping.

        If a loss or a gradient of any rank is not finite, neither is the norm, and no rank updates
        anything: not the parameters, nor the schedules. Raises `IlmCompileError` on all ranks
        after `max_skips` such steps in a row.
        """
        scale = self.loss_scale
        ACTIVITY.do("gradient norm")
        norm = self.parallel.clip_grad_norm_(self.max_grad_norm, scale=scale).item()
        is_finite = math.isfinite(norm)
        self.num_steps += 1
        if self.scaler is not None:
            self.scaler.update(overflowed=not is_finite)
        if not is_finite:
            self._count_skip(norm)
            return norm
        self._num_skips_in_a_row = 0
        ACTIVITY.do("optimizer")
        self.optimizer.step()
        for scheduler in (self.lr_scheduler, self.beta2_scheduler):
            if scheduler is not None:
                scheduler.step()
        return norm

    def request_stop(self, reason: str) -> None:
        """End `fit` in good order after the step under way. Any rank may ask, at any moment.

        It takes effect at the end of that step, on all ranks at once: then `stop_reason` is set,
        and hooks see it in `on_step_end`.
        """
        self._stop_wish = reason

    def fit(
        self,
        batches: Iterable[Batch],
        num_steps: int,
        *,
        metrics_path: str | Path | None = None,
        progress: bool = True,
        callback: Callable[[StepMetrics], None] | None = None,
        batch_is_local: bool = False,
    ) -> list[StepMetrics]:
        """Train for `num_steps` batches; return the metrics of each step, of the last `MAX_HISTORY`
        at most, for a run may be long.

        Fewer steps if somebody asks to stop: `stop_reason` then says why. Rank 0 appends the
        metrics as JSON lines to `metrics_path` and shows the progress. callback: called with them
        on every rank after each step. These three come before `hooks`. batch_is_local: as for
        `Parallel.execute_schedule`. Raises `IlmCompileError` if the batches run out.
        """
        self.total_steps = self.num_steps + num_steps
        self.stop_reason = self._stop_wish = None
        hooks = Hooks([FitKeywords(metrics_path, progress, callback), *self.hooks])
        history: deque[StepMetrics] = deque(maxlen=MAX_HISTORY)
        error: BaseException | None = None
        try:
            ACTIVITY.enter("hooks before the first step", patient=True)
            ACTIVITY.steps_done, ACTIVITY.stopping = self.num_steps, ""
            hooks.start(self)
            given = islice(batches, num_steps)
            done = self._run(given, hooks, history, is_local=batch_is_local)
            if done < num_steps and self.stop_reason is None:
                raise IlmCompileError(
                    f"Trainer.fit: expected {num_steps} batches, got {done}; give an "
                    "endless iterator (BatchIterator is one) or fewer steps"
                )
        except BaseException as raised:
            error = raised
            raised.add_note(f"rank {self.parallel.mesh.rank}, in {ACTIVITY.text()}")
            hooks.exception(self, raised)
            raise
        finally:
            ACTIVITY.enter("hooks after the last step", patient=True)
            hooks.stop(self, error)
        return list(history)

    def state_dict(self) -> dict[str, Any]:
        """Counters, schedules and loss scale as plain values, the same on every rank.

        The optimizer's tensors are not among them: they are cut like the parameters, and the
        optimizer's own `state_dict` has them.
        """
        state: dict[str, Any] = {
            "num_steps": self.num_steps,
            "num_skipped_steps": self.num_skipped_steps,
            "num_skips_in_a_row": self._num_skips_in_a_row,
            "num_tokens": self.num_tokens,
            "num_executed_steps": self.parallel.num_steps,
        }
        for name, part in self._parts().items():
            state[name] = None if part is None else part.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; its optimizer is loaded before, by its own method.

        Of the schedules of this package the steps are loaded, what they do at each is this
        trainer's; torch's own load the rates too, which is warned of where they differ. A loss
        scale that only one of both has starts anew or is left out, with a warning. Raises
        `IlmCompileError` if `state` has a schedule that this trainer has not, or the other way
        round, before anything is changed.
        """
        parts = self._parts()
        if missing := sorted(set(self.state_dict()) - set(state)):
            raise IlmCompileError(
                f"Trainer.load_state_dict: expected {', '.join(self.state_dict())}, it lacks "
                f"{missing}; give what state_dict returned"
            )
        for name, part in parts.items():
            if (part is None) != (state[name] is None):
                if name == SCALER:
                    self._warn("the loss scale " + ("starts anew" if part else "is left out"))
                    continue
                has, lacks = ("trainer", "state") if part is not None else ("state", "trainer")
                raise IlmCompileError(
                    f"Trainer.load_state_dict: the {has} has {name} and the {lacks} has none; "
                    "resume with the settings of the run that was saved"
                )
        for name, part in parts.items():
            if part is not None and state[name] is not None:
                own = getattr(part, "base_lrs", None)
                part.load_state_dict(state[name])
                if own != (saved := getattr(part, "base_lrs", None)):
                    self._warn(
                        f"{name} goes on with the rates it was saved with, {saved}: {own} "
                        "have no effect"
                    )
        if self.lr_scheduler is not None:
            rates = self.lr_scheduler.get_last_lr()
            for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = lr
        self.num_steps = state["num_steps"]
        self.num_skipped_steps = state["num_skipped_steps"]
        self.num_tokens = state["num_tokens"]
        self.parallel.num_steps = state["num_executed_steps"]
        self._num_skips_in_a_row = state["num_skips_in_a_row"]

    def _parts(self) -> dict[str, Any]:
        return {
            "lr_scheduler": self.lr_scheduler,
            "beta2_scheduler": self.beta2_scheduler,
            SCALER: self.scaler,
        }

    def _warn(self, message: str) -> None:
        if self.parallel.mesh.rank == 0:
            warnings.warn(f"Trainer.load_state_dict: {message}", stacklevel=3)

    def _run(
        self,
        batches: Iterable[Batch],
        hooks: Hooks,
        history: deque[StepMetrics],
        *,
        is_local: bool,
    ) -> int:
        """Returns how many steps were done."""
        done = 0
        for done, batch in enumerate(batches, 1):
            step = self.num_steps + 1
            ACTIVITY.enter(f"hooks before step {step}", patient=True)
            hooks.step_start(self, step)
            metrics = self._step_on(batch, is_first=done == 1, is_local=is_local)
            history.append(metrics)
            ACTIVITY.steps_done = self.num_steps
            ACTIVITY.enter(f"hooks after step {step}", patient=True)
            hooks.step_end(self, metrics)
            ACTIVITY.enter(f"reading the batch of step {step + 1}", patient=True)
            if self.stop_reason is not None:
                break
        return done

    def _step_on(self, batch: Batch, *, is_first: bool, is_local: bool) -> StepMetrics:
        # The first step may take long, for kernels are compiled.
        ACTIVITY.enter(f"step {self.num_steps + 1}", patient=is_first)
        start = time.perf_counter()
        lr = float(self.optimizer.param_groups[0]["lr"])
        scale = self.loss_scale
        num_skipped = self.num_skipped_steps
        self.zero_grad()
        try:
            loss = self.execute_schedule(batch, batch_is_local=is_local)
            assert isinstance(loss, Tensor)
            grad_norm = self.step()
        except NoTargetsError as error:  # on every rank alike, before anything was run
            loss, grad_norm = torch.tensor(math.nan), math.nan
            self._pass_over(error)
        if loss.device.type == "cuda":
            torch.cuda.synchronize(loss.device)
        num_tokens = next(iter(batch.values())).numel()
        if is_local or isinstance(batch, LocalBatch):
            num_tokens *= self.parallel.mesh.dp.size
        self.num_tokens += num_tokens
        ACTIVITY.do("agreement on stopping")
        ranks = exchange([float(self._stop_wish is not None)], self.parallel.mesh)
        self._agree_to_stop([wish for (wish,) in ranks])
        flops = self.parallel.model_flops
        return StepMetrics.measured(
            step=self.num_steps,
            loss=loss.item(),
            grad_norm=grad_norm,
            lr=lr,
            num_tokens=num_tokens,
            model_flops=math.nan if flops is None else flops,
            step_time_s=time.perf_counter() - start,
            world_size=self.parallel.mesh.world_size,
            loss_scale=scale,
            is_skipped=self.num_skipped_steps > num_skipped,
            num_skipped_steps=self.num_skipped_steps,
            num_consumed_tokens=self.num_tokens,
        )

    def _agree_to_stop(self, wishes: Sequence[float]) -> None:
        wishing = [rank for rank, wish in enumerate(wishes) if wish]
        if wishing:
            self.stop_reason = self._stop_wish or f"asked for by rank {wishing[0]}"
            ACTIVITY.stopping = self.stop_reason

    def _pass_over(self, error: NoTargetsError) -> None:
        """Count a step whose batch trains nothing, as one whose loss is not finite."""
        self.num_steps += 1
        if self.parallel.mesh.rank == 0:
            warnings.warn(f"step {self.num_steps} is skipped: {error}", stacklevel=4)
        self._count_skip(math.nan)

    def _count_skip(self, norm: float) -> None:
        self.num_skipped_steps += 1
        self._num_skips_in_a_row += 1
        if self._num_skips_in_a_row >= self.max_skips:
            raise IlmCompileError(
                f"Trainer: expected a finite loss and finite gradients, got a gradient norm of "
                f"{norm} in {self._num_skips_in_a_row} steps in a row, step {self.num_steps} the "
                "last; resume from an earlier checkpoint with a lower learning rate"
            )

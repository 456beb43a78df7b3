"""What changes over the steps: the learning rate, and Adam's second beta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ilm_compile.errors import IlmCompileError


def lr_schedule(
    optimizer: Optimizer,
    *,
    warmup_steps: int,
    total_steps: int,
    min_ratio: float = 0.1,
    init_steps: int = 0,
    hold_peak: bool = False,
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `min_ratio` of the learning rate.

    With t = 1, 2, ... the step being taken: 0 up to init_steps, then (t - init_steps) /
    warmup_steps of the rate for warmup_steps, then min_ratio + (1 - min_ratio) *
    (1 + cos(pi * u)) / 2 with u going from 0 to 1 at total_steps, and min_ratio from there on.
    hold_peak: the cosine begins with a step at u = 0 and is a step behind from there on, as that of
    InternEvo is. Call `.step()` after every optimizer step.
    Formula: Loshchilov and Hutter, "SGDR" (arXiv 1608.03983), equation 5, with one period.
    Its state is the number of steps: a resumed run follows the rates and lengths that are given
    here. Raises `IlmCompileError` unless the phases fit into total_steps.
    """
    start = init_steps + warmup_steps
    if not (0 <= init_steps and 0 <= warmup_steps and start < total_steps):
        raise IlmCompileError(
            "lr_schedule: expected 0 <= warmup_steps < total_steps, init_steps counted in, got "
            f"warmup_steps={warmup_steps}, total_steps={total_steps}, init_steps={init_steps}"
        )
    if not 0 <= min_ratio <= 1:
        raise IlmCompileError(f"lr_schedule: min_ratio must lie in [0, 1], got {min_ratio}")

    def ratio(steps_done: int) -> float:
        step = steps_done + 1
        if step <= init_steps:
            return 0.0
        if step <= start:
            return (step - init_steps) / warmup_steps
        progress = min(1.0, (step - start - hold_peak) / (total_steps - start))
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return _ByCount(optimizer, ratio)


class _ByCount(LambdaLR):
    """torch's keeps the rates it was made with, but not the function: a mixture when resumed."""

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        ratios = [function(self.last_epoch) for function in self.lr_lambdas]
        self._last_lr = [rate * ratio for rate, ratio in zip(self.base_lrs, ratios, strict=True)]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


class Beta2Scheduler:
    """Sets Adam's second beta to max(init_beta2, 1 - t^-c) after its t-th `.step()`.

    Until then, and for c = 0 always, it is `init_beta2`. The longer memory late in training, where
    gradients of rare tokens come seldom; the rule is that of Zhai et al. (arXiv 2106.04560) and
    Chowdhery et al. (arXiv 2204.02311, section 5) with InternLM's floor (Beta2Scheduler in
    InternEvo internlm/solver/beta2_scheduler.py). Call `.step()` after every optimizer step.
    """

    def __init__(self, optimizer: Optimizer, *, init_beta2: float, c: float = 0.0) -> None:
        if not 0 <= init_beta2 < 1:
            raise IlmCompileError(
                f"beta2 schedule: init_beta2 must lie in [0, 1), got {init_beta2}"
            )
        if not (math.isfinite(c) and c >= 0):
            raise IlmCompileError(f"beta2 schedule: c must be 0 or above, got {c}")
        if any("betas" not in group for group in optimizer.param_groups):
            raise IlmCompileError(
                "beta2 schedule: expected an optimizer whose groups have betas, such as AdamW, got "
                f"{type(optimizer).__name__}; leave beta2_scheduler out"
            )
        self.optimizer = optimizer
        self.init_beta2 = init_beta2
        self.c = c
        self.num_steps = 0
        for group in optimizer.param_groups:
            group.setdefault("initial_betas", group["betas"])  # as torch's do with "initial_lr"
        self._apply()

    @property
    def beta2(self) -> float:
        """What the next optimizer step uses."""
        if self.c == 0 or self.num_steps == 0:
            return self.init_beta2
        return max(self.init_beta2, 1 - 1 / math.pow(self.num_steps, self.c))

    def step(self) -> None:
        """Count an optimizer step."""
        self.num_steps += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """The steps counted; `init_beta2` and `c` are the config's."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken."""
        self.num_steps = state["num_steps"]
        self._apply()

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            group["betas"] = (group["betas"][0], self.beta2)

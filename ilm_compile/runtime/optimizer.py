"""AdamW with weight decay on matrices only, and its learning rate over the steps."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ilm_compile.errors import IlmCompileError


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
) -> AdamW:
    """AdamW over the trainable parameters: decay on those with two or more dims, none on the rest.

    The rest are norms and biases. Both groups always exist, in the order (decay, no decay), even
    where a pipeline stage has no parameter for one.
    """
    _require(math.isfinite(lr) and lr > 0, f"lr must be above 0, got {lr}")
    _require(all(0 <= beta < 1 for beta in betas), f"betas must lie in [0, 1), got {betas}")
    _require(math.isfinite(eps) and eps > 0, f"eps must be above 0, got {eps}")
    _require(
        math.isfinite(weight_decay) and weight_decay >= 0,
        f"weight_decay must be 0 or above, got {weight_decay}",
    )
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    _require(bool(trainable), "expected at least one parameter with requires_grad, got none")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=betas, eps=eps)


def lr_schedule(
    optimizer: Optimizer, *, warmup_steps: int, total_steps: int, min_ratio: float = 0.1
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to `min_ratio` of the learning rate.

    With t = 1, 2, ... the step being taken: t / warmup_steps of the rate up to warmup_steps, then
    min_ratio + (1 - min_ratio) * (1 + cos(pi * u)) / 2 with u going from 0 to 1 at total_steps, and
    min_ratio from there on. Call `.step()` after every optimizer step.
    Formula: Loshchilov and Hutter, "SGDR" (arXiv 1608.03983), equation 5, with one period.
    """
    if not 0 <= warmup_steps < total_steps:
        raise IlmCompileError(
            "lr_schedule: expected 0 <= warmup_steps < total_steps, "
            f"got warmup_steps={warmup_steps}, total_steps={total_steps}"
        )
    if not 0 <= min_ratio <= 1:
        raise IlmCompileError(f"lr_schedule: min_ratio must lie in [0, 1], got {min_ratio}")

    def ratio(steps_done: int) -> float:
        step = steps_done + 1
        if step <= warmup_steps:
            return step / warmup_steps
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, ratio)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IlmCompileError(f"adamw: {message}")

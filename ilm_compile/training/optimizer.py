"""AdamW and what changes over the steps, from a config."""

from __future__ import annotations

from typing import NamedTuple

from torch.optim import AdamW
from torch.optim.lr_scheduler import LRScheduler

from ilm_compile.config import Config
from ilm_compile.runtime import Beta2Scheduler, LossScaler, Parallel, adamw, lr_schedule


class Optimization(NamedTuple):
    """What `initialize_optimizer` returns, in InternEvo's order."""

    optimizer: AdamW
    beta2_scheduler: Beta2Scheduler
    lr_scheduler: LRScheduler


def initialize_optimizer(config: Config, parallel: Parallel) -> Optimization:
    """The optimizer of the model's parameters, its beta2 scheduler and its lr scheduler."""
    options, scheduler = config.optimizer, config.lr_scheduler
    optimizer = adamw(
        parallel.named_parameters(),
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        decay_all=options.decay_all,
    )
    lr_scheduler = lr_schedule(
        optimizer,
        warmup_steps=int(scheduler.warmup_ratio * config.lr_total_steps),
        total_steps=config.lr_total_steps,
        min_ratio=scheduler.eta_min / options.lr,
        init_steps=scheduler.init_steps,
        hold_peak=scheduler.hold_peak,
    )
    init_beta2 = config.beta2_scheduler.init_beta2
    beta2_scheduler = Beta2Scheduler(
        optimizer,
        init_beta2=options.beta2 if init_beta2 is None else init_beta2,
        c=config.beta2_scheduler.c,
    )
    return Optimization(optimizer, beta2_scheduler, lr_scheduler)


def loss_scaler(config: Config) -> LossScaler | None:
    """The loss scale of float16 training, None for every other dtype."""
    options = config.grad_scaler
    if config.train.dtype != "float16":
        return None
    return LossScaler(
        initial_scale=options.initial_scale,
        min_scale=options.min_scale,
        growth_interval=options.growth_interval,
        growth_factor=options.growth_factor,
        backoff_factor=options.backoff_factor,
        max_scale=options.max_scale,
        hysteresis=options.hysteresis,
    )

"""The Trainer of a config, and the same job in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ilm_compile.config import Config
from ilm_compile.kernels import set_flash_attention
from ilm_compile.runtime import Beta2Scheduler, Hook, Parallel, Trainer
from ilm_compile.training.agreement import agree_on_start
from ilm_compile.training.checkpoints import initialize_checkpoints, start_from
from ilm_compile.training.data import (
    Batches,
    TrainBatches,
    get_train_data_loader,
    get_validation_data_loaders,
)
from ilm_compile.training.earlier_run import set_aside
from ilm_compile.training.guard import Guard
from ilm_compile.training.hooks import make_hooks
from ilm_compile.training.model import initialize_model
from ilm_compile.training.optimizer import initialize_optimizer, loss_scaler
from ilm_compile.training.preflight import check_start

CONFIG_FILE = "config.toml"


def initialize_trainer(
    config: Config,
    parallel: Parallel,
    optimizer: Optimizer,
    *,
    beta2_scheduler: Beta2Scheduler | None = None,
    lr_scheduler: LRScheduler | None = None,
    hooks: Sequence[Hook] = (),
) -> Trainer:
    """The Trainer: train(), eval(), zero_grad(), execute_schedule(batch), step(), or fit()."""
    return Trainer(
        parallel,
        optimizer=optimizer,
        beta2_scheduler=beta2_scheduler,
        lr_scheduler=lr_scheduler,
        scaler=loss_scaler(config),
        max_grad_norm=config.train.max_grad_norm or None,
        max_skips=config.train.max_skips,
        hooks=hooks,
    )


def train(config: Config) -> Trainer:
    """The whole job of a config: check, build, resume, train; returns the Trainer at its end.

    Under torchrun every rank calls it. Raises `StartError` before any process group is made if the
    run cannot work, and `IlmCompileError` on all ranks if one was started otherwise.
    """
    set_torch_flags(config)
    expected = check_start(config)
    with Guard(config) as guard:
        agree_on_start(config, on_met=guard.watch)
        guard.watch()
        batches = get_train_data_loader(config)  # once ranks can wait for the one that reads
        validation = get_validation_data_loaders(config)
        trainer = _train(config, batches, validation, expected)
        guard.record_success(trainer)
    return trainer


def _train(
    config: Config, batches: TrainBatches, validation: Mapping[str, Batches], expected: str
) -> Trainer:
    parallel = initialize_model(config)
    batches.agree(parallel.mesh)
    optimizer, beta2_scheduler, lr_scheduler = initialize_optimizer(config, parallel)
    trainer = initialize_trainer(
        config,
        parallel,
        optimizer,
        beta2_scheduler=beta2_scheduler,
        lr_scheduler=lr_scheduler,
        hooks=make_hooks(config, parallel, validation),
    )
    is_first = parallel.mesh.rank == 0
    if is_first and expected and config.logging.console:
        print(expected, flush=True)
    if config.ckpt.enabled or config.ckpt.load_path is not None:
        manager = initialize_checkpoints(config, trainer, batches)
        started, *changed = start_from(config, manager, trainer)
        if config.ckpt.enabled:
            trainer.hooks.append(manager)
        if is_first:
            changed += set_aside(config.run_folder) if trainer.num_steps == 0 else []
            told = [started, *changed] if config.logging.console else changed
            print("".join(f"{line}\n" for line in told), end="", flush=True)
    if is_first:  # only now: a start that is refused leaves the config of the run as it was
        config.save(config.run_folder / CONFIG_FILE)
    left = config.train.total_steps - trainer.num_steps
    if left > 0:
        trainer.fit(batches, left, progress=False)
    return trainer


def set_torch_flags(config: Config) -> None:
    """What the config says of kernels, for this process.

    Raises IlmCompileError if this machine has not got them.
    """
    train = config.train
    torch.use_deterministic_algorithms(train.deterministic)
    torch.backends.cudnn.benchmark = train.cudnn_benchmark
    torch.set_float32_matmul_precision("high" if train.tf32 else "highest")
    if train.flash_attention is not None:
        set_flash_attention(train.flash_attention)

"""InternEvo's `internlm.initialize`: the parser, the launch, the Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ilm_compile.config import Config, load_config, make_config
from ilm_compile.errors import IlmCompileError
from ilm_compile.internevo.job import get_config, set_config
from ilm_compile.internevo.trainer import Trainer
from ilm_compile.runtime import Beta2Scheduler, Parallel
from ilm_compile.training import check_start
from ilm_compile.training import initialize_trainer as _initialize_trainer
from ilm_compile.training.launch import LAUNCHERS
from ilm_compile.training.launch import launch_from_slurm as _read_slurm
from ilm_compile.training.notices import tell_notices
from ilm_compile.training.parser import get_default_parser as get_default_parser
from ilm_compile.training.trainer import set_torch_flags

AnyConfig = str | Path | Mapping[str, Any] | Config


def initialize_distributed_env(
    config: AnyConfig,
    launcher: str = "slurm",
    master_port: int | None = 8888,
    seed: int | None = None,
    args_check: bool = True,
) -> None:
    """Read the config and say which process this is; the groups are made with the model.

    config: a file, a mapping with InternEvo's keys, or a config of ours. launcher: "slurm" or
    "torch", which is torchrun. seed: over that of the config. args_check: check that the run can
    start here. Raises `ConfigError` and, on checking, `StartError`.
    """
    if launcher not in LAUNCHERS:
        raise IlmCompileError(
            f"initialize_distributed_env: expected a launcher of {', '.join(LAUNCHERS)}, got "
            f"{launcher!r}"
        )
    if launcher == "slurm":
        _read_slurm(port=master_port)
    read = _read(config, [] if seed is None else [f"train.seed={seed}"])
    tell_notices(read)
    set_torch_flags(read)
    if args_check:
        check_start(read)
    set_config(read)


def launch_from_torch(config: AnyConfig, seed: int | None = None) -> None:
    """`initialize_distributed_env` under torchrun, nothing checked."""
    initialize_distributed_env(config, "torch", seed=seed, args_check=False)


def launch_from_slurm(
    config: AnyConfig, host: str | None = None, port: int = 8888, seed: int | None = None
) -> None:
    """`initialize_distributed_env` under srun, nothing checked. host: of rank 0."""
    _read_slurm(host=host, port=port)
    initialize_distributed_env(config, "torch", seed=seed, args_check=False)


def initialize_trainer(
    model: Parallel,
    optimizer: Optimizer,
    criterion: None = None,
    train_dataloader: Iterable[Any] | None = None,
    test_dataloader: Iterable[Any] | None = None,
    lr_scheduler: LRScheduler | None = None,
    beta2_scheduler: Beta2Scheduler | None = None,
    scheduler_hooks: Sequence[Any] | None = None,
) -> tuple[Trainer, Iterable[Any] | None, Iterable[Any] | None, LRScheduler | None]:
    """The Trainer, and the loaders and the lr scheduler as they were given.

    Raises `IlmCompileError` for a criterion, which is compiled with the model here, and for hooks
    of InternEvo's schedulers.
    """
    if criterion is not None:
        raise IlmCompileError(
            "initialize_trainer: the loss is compiled with the model: leave criterion out; label "
            "smoothing is loss.label_smoothing, another loss is loss_fn= of ilm_compile.parallelize"
        )
    if scheduler_hooks:
        raise IlmCompileError(
            "initialize_trainer: scheduler_hooks are InternEvo's own: write them as "
            "ilm_compile.runtime.Hook and give hooks= to ilm_compile.initialize_trainer"
        )
    trainer = _initialize_trainer(
        get_config(),
        model,
        optimizer,
        beta2_scheduler=beta2_scheduler,
        lr_scheduler=lr_scheduler,
    )
    return Trainer(trainer), train_dataloader, test_dataloader, lr_scheduler


def _read(config: AnyConfig, overrides: list[str]) -> Config:
    if isinstance(config, Config):
        return make_config(config.to_dict(), overrides)
    if isinstance(config, Mapping):
        return make_config(config, overrides, is_theirs=True)
    return load_config(config, overrides)

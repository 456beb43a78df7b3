"""What watches a training, from a config: logger, monitor, evaluation, profiler, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from ilm_compile.config import Config
from ilm_compile.cost.hardware import GIB, HARDWARE
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime import Hook, Parallel
from ilm_compile.runtime.observe import (
    Command,
    Logger,
    MemoryBreakdown,
    Monitor,
    PipelineTimeline,
    Profiler,
    Webhook,
    WeightsAndBiases,
)
from ilm_compile.runtime.observe.sinks import Sink
from ilm_compile.training.data import Batches
from ilm_compile.training.evaluation import Evaluation

PROFILE_FOLDER = "profile"
MONITOR_FOLDER = "monitor"
ENV = "env:"


def make_hooks(
    config: Config, parallel: Parallel, validation: Mapping[str, Batches] | None = None
) -> list[Hook]:
    """All hooks but the checkpoints, in the order in which they are told of a step."""
    logger = make_logger(config, parallel)
    hooks: list[Hook] = [logger, make_monitor(config)]
    if validation:
        hooks.append(Evaluation(validation, logger, every=config.data.valid_every))
    return hooks + make_profilers(config)


def make_logger(config: Config, parallel: Parallel) -> Logger:
    """Lines, metrics.jsonl and TensorBoard in the run's folder, and Weights & Biases."""
    project = config.logging.wandb_project
    wandb = [WeightsAndBiases(project, config.job_name, config.to_dict())] if project else []
    return Logger(
        config.run_folder,
        console=config.logging.console,
        tensorboard=config.logging.tensorboard,
        recorders=wandb,
        peak_flops=peak_flops(config, parallel.mesh.device),
    )


def make_monitor(config: Config) -> Monitor:
    """The monitor with the config's limits, where 0 is off."""
    options = config.monitor
    return Monitor(
        job=config.job_name,
        sinks=make_sinks(config),
        stuck_after_s=options.stuck_s or None,
        spike_ratio=options.loss_spike_ratio or None,
        slow_ratio=options.slow_rank_ratio or None,
        slow_every=options.slow_rank_every,
        folder=config.run_folder / MONITOR_FOLDER,
        min_free_bytes=int(options.min_free_gib * GIB) or None,
        grace_s=options.grace_s,
    )


def make_sinks(config: Config) -> list[Sink]:
    """Who is told beside the log. Raises `IlmCompileError` for an address that cannot be one."""
    options, sinks = config.monitor, list[Sink]()
    if options.webhook:
        sinks.append(Webhook(_address(options.webhook), style=options.webhook_kind))
    if options.command:
        sinks.append(Command(options.command))
    return sinks


def _address(text: str) -> str:
    """The address, from the environment where the config says "env:NAME" to keep it secret."""
    if not text.startswith(ENV):
        return text
    name = text.removeprefix(ENV)
    if not os.environ.get(name):
        raise IlmCompileError(f"monitor.webhook={text!r}: the variable {name} is not set")
    return os.environ[name]


def make_profilers(config: Config) -> list[Hook]:
    """Traces, memory and timeline if the profiler is on."""
    options, folder = config.profiler, config.run_folder / PROFILE_FOLDER
    if not options.enabled:
        return []
    hooks: list[Hook] = [
        Profiler(
            folder,
            first_step=options.first_step,
            num_steps=options.num_steps,
            every=options.every or None,
            with_stack=options.with_stack,
        )
    ]
    # before and after the window, so that neither measures the other
    if options.memory:
        hooks.append(MemoryBreakdown(folder, step=max(1, options.first_step - 1)))
    if options.timeline:
        hooks.append(PipelineTimeline(folder, step=options.first_step + options.num_steps))
    return hooks


def peak_flops(config: Config, device: torch.device) -> float | None:
    """Of this device in the dtype of the products, None for one that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    known = [hardware for key, hardware in HARDWARE.items() if key.partition("-")[0] in name]
    dtype = getattr(torch, config.train.dtype)
    return known[0].peak_flops[dtype] if known else None

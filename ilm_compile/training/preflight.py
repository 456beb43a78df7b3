"""What would make a run fail later, found in its first seconds, before any group is made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import nn

from ilm_compile.config import Config
from ilm_compile.config.model_section import FAMILIES
from ilm_compile.convert import open_weights
from ilm_compile.cost.hardware import GIB
from ilm_compile.cost.sizes import ModelSizes
from ilm_compile.errors import IlmCompileError
from ilm_compile.partitioning import compile, make_plan
from ilm_compile.planner.model_sizes import sizes_of
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.runtime.checkpoint.storage import open_storage
from ilm_compile.runtime.data import BatchNumbers, BatchRamp
from ilm_compile.runtime.observe.recorders import METRICS_FILE
from ilm_compile.training.checkpoints import checkpoint_folder, local_path
from ilm_compile.training.data import global_batch_size
from ilm_compile.training.earlier_run import died_young
from ilm_compile.training.fits import available_bytes, expected, too_large
from ilm_compile.training.hooks import make_sinks
from ilm_compile.training.launch import Place, read_place
from ilm_compile.training.model import (
    blocks_of,
    build_model,
    input_spec,
    loss_function,
    only_block,
    weights_folder,
)


class StartError(IlmCompileError):
    """A run cannot start; the message has a line for each reason."""


@dataclass(frozen=True)
class Start:
    """A run that is about to start."""

    config: Config
    place: Place
    plan: Plan
    model: nn.Module

    @property
    def data_parallel(self) -> int:
        return max(1, self.place.world_size // self.plan.ranks_per_replica)

    @cached_property
    def one_block(self) -> Program | None:
        """The model of one of its blocks, traced; None where it has no list of them."""
        model = only_block(self.model)
        if model is None:
            return None
        config = self.config
        return trace(model, example_inputs=input_spec(config), loss_fn=loss_function(config))

    @cached_property
    def sizes(self) -> ModelSizes | None:
        """The sizes of the model; None of one that has no blocks of a decoder."""
        try:
            if self.one_block is None:
                return None
            return replace(sizes_of(self.one_block), layers=len(blocks_of(self.model)))
        except IlmCompileError:  # the checks say what is wrong with the model itself
            return None


Check = Callable[[Start], Iterator[str]]


def check_start(config: Config) -> str:
    """Raise `StartError` if the run cannot work here: sizes, plan, paths, disk, dtype, memory.

    Returns in one line what a step is expected to take; nothing for a model without blocks.

    Local: no collective, no group, no weight. Costs about a second, in which a small model of the
    same widths is partitioned.
    """
    start = _check(config, _CHECKS)
    return expected(
        config,
        start.plan,
        start.sizes,
        world_size=start.place.world_size,
        available=available_bytes(start.place),
    )


def check_evaluation(config: Config) -> None:
    """Raise `StartError` if the model cannot be evaluated here; what `check_start` says holds.

    Nothing is asked of what only training needs: its data, its folder, memory for an optimizer.
    """
    _check(config, _EVALUATION_CHECKS)


def _check(config: Config, checks: Sequence[Check]) -> Start:
    try:
        start = Start(config, read_place(), make_plan(config.plan()), build_model(config))
        input_spec(config)
    except IlmCompileError as error:
        raise StartError(str(error)) from error
    problems = [problem for check in checks for problem in _run(check, start)]
    if problems:
        raise StartError("\n  ".join(problems))
    return start


def _run(check: Check, start: Start) -> Iterator[str]:
    try:
        yield from check(start)
    except IlmCompileError as error:
        yield str(error)


def _world(start: Start) -> Iterator[str]:
    needed, found = start.plan.ranks_per_replica, start.place.world_size
    plan = start.plan
    always = {"parallel.tensor": plan.tp, "parallel.pipeline": plan.pp}
    others = {"parallel.context": plan.cp, "parallel.expert": plan.ep}
    sizes = always | {name: size for name, size in others.items() if size > 1}
    if not start.place.is_started and needed > 1:
        yield (
            f"{' and '.join(f'{name}={size}' for name, size in sizes.items())} need {needed} "
            f"processes: torchrun --nproc-per-node {needed} -m ilm_compile.cli ..."
        )
    elif found % needed:
        yield (
            f"expected a multiple of {'*'.join(sizes)} = {needed} processes, got "
            f"{found}: start {-(-found // needed) * needed}, or change the plan"
        )


def _batches(start: Start) -> Iterator[str]:
    data = start.config.data
    BatchNumbers.parse(data.skip_batches)
    ramp = BatchRamp.parse(data.rampup_batch_size, unit=data.rows * start.data_parallel)
    full = global_batch_size(start.config)
    if ramp is not None and ramp.start > full:
        yield (
            f"data.rampup_batch_size={data.rampup_batch_size!r} starts with {ramp.start} rows, a "
            f"full step has {full}; start lower"
        )


def _model(start: Start) -> Iterator[str]:
    """Partition a model of the same widths with a block for each stage: it shows what cannot be."""
    config, plan = start.config, start.plan
    if config.model.type not in FAMILIES:
        return
    num_layers = config.model.fields["num_layers"]
    if num_layers < plan.num_stages:
        yield (
            f"parallel.pipeline * parallel.num_chunks = {plan.num_stages} stages need as many "
            f"blocks, model.num_layers={num_layers}"
        )
        return
    if start.one_block is not None:
        alone = plan.replace(pp=1, num_chunks=1, num_microbatches=1, schedule="1f1b")
        compile(start.one_block, alone)


def _device(start: Start) -> Iterator[str]:
    dtype = start.config.train.dtype
    if not torch.cuda.is_available():
        return
    if start.place.local_rank >= torch.cuda.device_count():
        yield (
            f"local rank {start.place.local_rank} needs a GPU of its own, this machine has "
            f"{torch.cuda.device_count()}: start fewer processes on it"
        )
    elif dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield f"train.dtype={dtype!r}: {torch.cuda.get_device_name()} has no bfloat16; use float32"


def _memory(start: Start) -> Iterator[str]:
    if start.config.parallel.check_memory:
        yield from too_large(
            start.config,
            start.plan,
            start.model,
            start.sizes,
            world_size=start.place.world_size,
            available=available_bytes(start.place),
        )


def _folders(start: Start) -> Iterator[str]:
    config = start.config
    folders = {"logging.folder": config.run_folder}
    ckpt = checkpoint_folder(config)
    if config.ckpt.enabled and "://" not in ckpt:
        folders["ckpt.folder"] = Path(local_path(ckpt))
    if config.ckpt.enabled and "://" in ckpt:
        open_storage(ckpt)  # what it needs must be installed
    for key, folder in folders.items():
        if problem := unwritable(folder):
            yield f"{key}: {problem}"
    if not any(unwritable(folder) for folder in folders.values()) and "ckpt.folder" in folders:
        yield from _disk(start, folders["ckpt.folder"])
    yield from _earlier_run(start, folders.get("ckpt.folder"))


def _disk(start: Start, folder: Path) -> Iterator[str]:
    """A checkpoint holds every weight and Adam's two moments."""
    size = sum(3 * prod(p.shape) * p.dtype.itemsize for p in start.model.parameters())
    free = shutil.disk_usage(_existing(folder)).free
    if free < size:
        yield (
            f"ckpt.folder: a checkpoint needs about {size / GIB:.1f} GiB, {folder} has "
            f"{free / GIB:.1f} GiB free; free some or choose another folder"
        )


def _earlier_run(start: Start, checkpoints: Path | None) -> Iterator[str]:
    """Two runs must not write into one folder, unless the second goes on with the first.

    Whether there is a checkpoint that it can go on with is found out when it is read.
    """
    config = start.config
    is_resumed = config.ckpt.enabled and config.ckpt.auto_resume
    has_checkpoint = checkpoints is None or any(checkpoints.glob("step-*"))
    if (config.run_folder / METRICS_FILE).exists() and not (
        is_resumed and (has_checkpoint or died_young(config))
    ):
        yield (
            f"{config.run_folder} holds an earlier run and there is no checkpoint to go on from; "
            "choose another job_name, or remove it"
        )
    is_own = (
        checkpoints is not None
        and config.ckpt.load_path is not None
        and (Path(local_path(config.ckpt.load_path)).absolute().parent == checkpoints.absolute())
    )
    if config.ckpt.enabled and checkpoints and has_checkpoint and not (is_resumed or is_own):
        yield (
            f"ckpt.folder: {checkpoints} holds the checkpoints of an earlier run, and with "
            "ckpt.auto_resume=false this one does not go on from them; move them away, or choose "
            "another folder"
        )


def _sources(start: Start) -> Iterator[str]:
    config = start.config
    yield from _unreadable("train_folder", config.data.train_folder)
    yield from _unreadable("valid_folder", config.data.valid_folder)
    path = config.ckpt.load_path
    if path is None:
        return
    if "://" not in path and not Path(local_path(path)).exists():
        yield f"ckpt.load_path: found nothing at {local_path(path)}"


def _weights(start: Start) -> Iterator[str]:
    """Those of model.hf, by their names and shapes."""
    if (folder := weights_folder(start.config)) is not None:
        open_weights(start.model, folder, "hf")
    yield from ()


def _validation(start: Start) -> Iterator[str]:
    folder = start.config.data.valid_folder
    if folder is None:
        yield (
            "data.valid_folder is not given, so there is nothing to evaluate on; give a folder of "
            "which each sub-folder is a set, with data.type 'tokenized', 'text' or 'chat'"
        )
    yield from _unreadable("valid_folder", folder)


def _unreadable(key: str, folder: str | None) -> Iterator[str]:
    if folder is not None and not os.access(folder, os.R_OK):
        yield f"data.{key}: expected a folder that can be read, found none at {folder}"


def _alerts(start: Start) -> Iterator[str]:
    make_sinks(start.config)
    command = start.config.monitor.command
    if command and shutil.which(command[0]) is None:
        yield f"monitor.command: found no program {command[0]!r}"


def unwritable(folder: Path) -> str | None:
    """Why a file cannot be made in the folder, None if it can. Makes nothing that stays."""
    existing = _existing(folder)
    if not existing.is_dir():
        return f"{existing} is a file, expected a folder"
    probe = existing / f".ilm_compile_probe_{os.urandom(8).hex()}"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        return f"cannot write in {existing}: {error.strerror}"
    return None


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next((path for path in (folder, *folder.parents) if path.exists()), folder)


_CHECKS: tuple[Check, ...] = (
    _world,
    _batches,
    _device,
    _memory,
    _folders,
    _sources,
    _weights,
    _alerts,
    _model,
)
_EVALUATION_CHECKS: tuple[Check, ...] = (_world, _device, _validation, _model)

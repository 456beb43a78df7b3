"""The logger: a line per step for people, and recorders for machines, on rank 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.hooks import Hook
from ilm_compile.runtime.metrics import StepMetrics
from ilm_compile.runtime.observe.recorders import (
    TRAIN,
    JsonLines,
    Recorder,
    Steady,
    TensorBoard,
)
from ilm_compile.runtime.observe.speed import Speed
from ilm_compile.runtime.trainer import Trainer


class Logger(Hook):
    """Tells what every step brought. Other ranks than 0 write nothing.

    folder: gets ``metrics.jsonl``, one line per step, and with `tensorboard` the folder of that
    name; None for neither. A resumed run appends. recorders: further ones, such as
    `WeightsAndBiases`. console: prints a line per step, on a terminal above a progress bar.
    peak_flops: see `Speed`; without it there is no MFU. A recorder that fails during the training
    is told of and left out. Raises `IlmCompileError` if `tensorboard` is wanted but not installed,
    or has no folder to go to.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        console: bool | Console = True,
        tensorboard: bool = False,
        recorders: Sequence[Recorder] = (),
        peak_flops: float | None = None,
    ) -> None:
        if tensorboard and folder is None:
            raise IlmCompileError("logger: tensorboard needs a folder, got none; give folder=")
        self._folder = None if folder is None else Path(folder)
        self._console = Console() if console is True else console or None
        own = [JsonLines()] if folder is not None else []
        every: list[Recorder] = [*own, *([TensorBoard()] if tensorboard else []), *recorders]
        self._recorders = [Steady(recorder) for recorder in every]
        self._peak_flops = peak_flops
        self._bar: Progress | None = None
        self._is_on = False
        self._has_compiled = False  # and has said so

    def on_start(self, trainer: Trainer) -> None:
        self._is_on = trainer.parallel.mesh.rank == 0
        if not self._is_on:
            return
        self._speed = Speed(
            trainer.parallel.mesh.world_size,
            peak_flops=self._peak_flops,
            hardware_flops=trainer.parallel.hardware_flops,
        )
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        for recorder in self._recorders:
            recorder.start(self._folder, trainer.num_steps)
        if self._console is not None and self._console.is_terminal:
            self._bar = _progress_bar(self._console)
            self._task = self._bar.add_task(
                "", total=trainer.total_steps, completed=trainer.num_steps
            )
            self._bar.start()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if not self._is_on:
            return
        figures = self._speed.update(metrics)
        if trainer.beta2_scheduler is not None:
            figures["beta2"] = trainer.optimizer.param_groups[0]["betas"][1]
        self._record(TRAIN, metrics.step, {**asdict(metrics), **figures})
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step)
        if self._console is not None:
            left = self._speed.seconds_left(trainer.total_steps - metrics.step)
            line = step_line(metrics, figures, total_steps=trainer.total_steps, seconds_left=left)
            self._print(line)
            self._print_compilations(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._is_on:
            for recorder in self._recorders:
                recorder.close()
        self._bar = None
        self._is_on = False

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Tell of further figures, such as those of an evaluation: ``log("valid/en", ...)``.

        To be called between `on_start` and `on_stop`, on any rank; only rank 0 writes.
        """
        if not self._is_on:
            return
        self._record(group, step, values)
        if self._console is not None:
            text = "  ".join(f"{key} {_figure(value)}" for key, value in values.items())
            self._print(f"step {step}  {group}  {text}")

    def _print(self, line: str) -> None:
        if self._console is not None:
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _print_compilations(self, trainer: Trainer) -> None:
        """Once, after the first step: what torch.compile has made of this rank's regions."""
        for compilation in trainer.parallel.compilations if not self._has_compiled else ():
            self._print(f"compile: {compilation}")
        self._has_compiled = True

    def _record(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for recorder in self._recorders:
            recorder.record(group, step, values)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def step_line(
    metrics: StepMetrics,
    figures: Mapping[str, float],
    *,
    total_steps: int,
    seconds_left: float = math.nan,
) -> str:
    """A step on one line for people, without what there is nothing to say of."""
    width = len(str(total_steps))
    averages = ", ".join(
        f"{figures[key]:,.0f} over {key.rpartition('_')[2]}"
        for key in figures
        if key.startswith("tokens_per_second_per_rank_")
    )
    parts = [
        f"step {metrics.step:>{width}}/{total_steps}",
        f"loss {metrics.loss:.4f}",
        f"grad norm {metrics.grad_norm:.3f}",
        f"lr {metrics.lr:.2e}",
        f"{metrics.tokens_per_second_per_rank:,.0f} tokens/s per device ({averages})",
    ]
    parts += [f"{key.upper()} {figures[key]:.1%}" for key in ("mfu", "hfu") if key in figures]
    parts.append(f"{metrics.step_time_s:.3g} s")
    if metrics.loss_scale != 1:
        parts.append(f"loss scale {metrics.loss_scale:g}")
    if metrics.is_skipped:
        parts.append(f"SKIPPED, {metrics.num_skipped_steps} so far")
    if math.isfinite(seconds_left) and metrics.step < total_steps:
        parts.append(f"{timedelta(seconds=round(seconds_left))} left")
    return "  ".join(parts)


def _progress_bar(console: Console) -> Progress:
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)

"""The logger: a line per step for people, JSON lines and TensorBoard for machines, on rank 0."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.hooks import Hook
from ilm_compile.runtime.metrics import StepMetrics
from ilm_compile.runtime.observe.speed import Speed
from ilm_compile.runtime.trainer import Trainer

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Logger(Hook):
    """Tells what every step brought. Other ranks than 0 write nothing.

    folder: gets ``metrics.jsonl``, one line per step, and with `tensorboard` the folder of that
    name; None for neither. A resumed run appends. console: prints a line per step, on a terminal
    above a progress bar. peak_flops: see `Speed`; without it there is no MFU. Raises
    `IlmCompileError` if `tensorboard` is wanted but not installed, or has no folder to go to.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        console: bool | Console = True,
        tensorboard: bool = False,
        peak_flops: float | None = None,
    ) -> None:
        if tensorboard and folder is None:
            raise IlmCompileError("logger: tensorboard needs a folder, got none; give folder=")
        self._folder = None if folder is None else Path(folder)
        self._console = Console() if console is True else console or None
        self._make_writer = _summary_writer() if tensorboard else None
        self._peak_flops = peak_flops
        self._file: TextIO | None = None
        self._writer: Any = None
        self._bar: Progress | None = None
        self._is_on = False

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
            self._file = open(self._folder / METRICS_FILE, "a", encoding="utf-8")
            if self._make_writer is not None:
                # What an earlier run wrote of steps after the one resumed from is hidden.
                self._writer = self._make_writer(
                    str(self._folder / TENSORBOARD_FOLDER), purge_step=trainer.num_steps + 1
                )
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
        self._write({**json.loads(metrics.to_json()), **figures})
        if self._writer is not None:
            self._write_scalars("train", metrics.step, {**_scalars(metrics), **figures})
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step)
        if self._console is not None:
            left = self._speed.seconds_left(trainer.total_steps - metrics.step)
            line = step_line(metrics, figures, total_steps=trainer.total_steps, seconds_left=left)
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_stop(self, trainer: Trainer) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()
        self._bar = self._file = self._writer = None
        self._is_on = False

    def log(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Tell of further figures, such as those of an evaluation: ``log("valid/en", ...)``.

        To be called between `on_start` and `on_stop`, on any rank; only rank 0 writes.
        """
        if not self._is_on:
            return
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._write({"step": step, "group": group, **finite})
        if self._writer is not None:
            self._write_scalars(group, step, values)
        if self._console is not None:
            text = "  ".join(f"{key} {_figure(value)}" for key, value in values.items())
            line = f"step {step}  {group}  {text}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _write(self, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps({**values, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()

    def _write_scalars(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{group}/{key}", value, step)


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


def _scalars(metrics: StepMetrics) -> dict[str, float]:
    values = json.loads(metrics.to_json())
    return {k: float("nan") if v is None else float(v) for k, v in values.items() if k != "step"}


def _progress_bar(console: Console) -> Progress:
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise IlmCompileError(
            "logger: TensorBoard's writer is not installed; pip install tensorboard, or leave "
            "tensorboard=True out"
        ) from None
    return SummaryWriter

"""What a step of training is measured by: as numbers, as a JSON line, as a progress bar."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step of the whole job.

    loss: mean over the target tokens of the global batch. grad_norm: of all parameters of all
    ranks, before clipping. lr: the rate the step used. num_tokens: of the global batch, padding
    included. model_flops_per_second: of the whole job, without recomputation. loss_scale: what the
    backward was scaled by. is_skipped: whether the step changed nothing because something was not
    finite; num_skipped_steps and num_consumed_tokens count from the start of the training.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    num_tokens: int
    step_time_s: float
    tokens_per_second: float
    tokens_per_second_per_rank: float
    model_flops_per_second: float
    loss_scale: float = 1.0
    is_skipped: bool = False
    num_skipped_steps: int = 0
    num_consumed_tokens: int = 0

    @classmethod
    def measured(
        cls,
        *,
        num_tokens: int,
        model_flops: float,
        step_time_s: float,
        world_size: int,
        **rest: Any,
    ) -> Self:
        """The metrics of a step that took `step_time_s` seconds and `model_flops` operations.

        rest: the fields that do not follow from these.
        """
        return cls(
            num_tokens=num_tokens,
            step_time_s=step_time_s,
            tokens_per_second=num_tokens / step_time_s,
            tokens_per_second_per_rank=num_tokens / step_time_s / world_size,
            model_flops_per_second=model_flops / step_time_s,
            **rest,
        )

    def summary(self) -> str:
        """One short line for people."""
        return (
            f"loss {self.loss:.4f}  grad norm {self.grad_norm:.3f}  lr {self.lr:.2e}  "
            f"{self.tokens_per_second:,.0f} tokens/s"
        )


class MetricsWriter:
    """Appends one JSON line per step to a file, on disk as soon as `write` returns.

    A line that a full disk tore is ended before the next one. Makes the folder.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO = open(path, "a", encoding="utf-8")
        self._is_torn = False

    def write(self, metrics: StepMetrics) -> None:
        self.write_values(asdict(metrics))

    def write_values(self, values: Mapping[str, Any]) -> None:
        """Append a line with these values; a number that is not finite becomes null."""
        start, self._is_torn = "\n" if self._is_torn else "", True  # until it is written whole
        lost = {k: None for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
        self._file.write(f"{start}{json.dumps({**values, **lost})}\n")
        self._file.flush()
        self._is_torn = False

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Progress:
    """Shows how far training is: a bar on a terminal, a plain line every `every` steps elsewhere.

    Rank 0 shows it, other ranks stay silent. Use as a context manager.
    """

    def __init__(
        self, total_steps: int, *, rank: int = 0, every: int = 10, console: Console | None = None
    ) -> None:
        self._total_steps = total_steps
        self._every = every
        self._shown = rank == 0
        self._console = console or Console()
        self._bar: RichProgress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self._shown and self._console.is_terminal:
            self._bar = RichProgress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self._total_steps)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, metrics: StepMetrics) -> None:
        """Show a finished step; `metrics.step` counts from 1."""
        if self._bar is not None:
            description = f"loss {metrics.loss:.4f}  {metrics.tokens_per_second:,.0f} tokens/s"
            self._bar.update(self._task, completed=metrics.step, description=description)
        elif self._shown and self._is_due(metrics.step):
            line = f"step {metrics.step}/{self._total_steps}  {metrics.summary()}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _is_due(self, step: int) -> bool:
        return step == 1 or step % self._every == 0 or step == self._total_steps

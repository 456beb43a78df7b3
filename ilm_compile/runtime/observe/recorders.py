"""Where the figures of a run are recorded for machines: JSON lines, TensorBoard, Weights & Biases.

None of them may end a training: one that fails is told of once. What is recorded comes from rank 0.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.metrics import MetricsWriter

LOGGER = logging.getLogger("ilm_compile.logger")
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
TRAIN = "train"  # the group of what every step brings


class Recorder(Protocol):
    """Takes figures between `start` and `close`; may raise, which ends it but not the training."""

    def start(self, folder: Path | None, step: int) -> None:
        """Recording begins after `step`, 0 in a new run. folder: the run's, if it has one."""

    def record(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of a step; group: "train", or such as "valid/en"."""

    def close(self) -> None:
        """Nothing more comes."""


class JsonLines:
    """Appends a line for each group and step to ``metrics.jsonl``; what is not finite is null."""

    def __init__(self) -> None:
        self._file: MetricsWriter | None = None

    def start(self, folder: Path | None, step: int) -> None:
        assert folder is not None
        self._file = MetricsWriter(folder / METRICS_FILE)

    def record(self, group: str, step: int, values: Mapping[str, float]) -> None:
        assert self._file is not None
        named = {} if group == TRAIN else {"group": group}
        rest = {key: value for key, value in values.items() if key != "step"}
        self._file.write_values({"step": step, **named, **rest, "time": round(time.time(), 3)})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoard:
    """Writes the folder ``tensorboard``. Raises `IlmCompileError` if its package is not there."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise IlmCompileError(
                "logger: TensorBoard's writer is not installed; pip install tensorboard, or leave "
                "tensorboard=True out"
            ) from None
        self._make: Callable[..., Any] = SummaryWriter
        self._writer: Any = None

    def start(self, folder: Path | None, step: int) -> None:
        assert folder is not None
        # What an earlier run wrote of steps after the one resumed from is hidden.
        self._writer = self._make(str(folder / TENSORBOARD_FOLDER), purge_step=step + 1)

    def record(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            if key != "step":
                self._writer.add_scalar(f"{group}/{key}", float(value), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases:
    """Sends the figures to Weights & Biases, under its own settings (``WANDB_MODE``, its login).

    project, name: where they are shown; a run of the same two goes on in the same graph. config:
    shown beside it. Raises `IlmCompileError` if the package is not there.
    """

    def __init__(self, project: str, name: str, config: Mapping[str, Any] | None = None) -> None:
        try:
            import wandb
        except ImportError:
            raise IlmCompileError(
                "logger: wandb is not installed; pip install wandb, or leave the project out"
            ) from None
        self._init: Callable[..., Any] = wandb.init
        self._options = {"project": project, "name": name, "config": dict(config or {})}
        self._run: Any = None

    def start(self, folder: Path | None, step: int) -> None:
        place = None if folder is None else str(folder)
        name = "".join(c if c.isalnum() else "-" for c in str(self._options["name"]))
        self._run = self._init(**self._options, dir=place, id=name, resume="allow")
        # The step of a group is its own: an evaluation comes after the step that it is of.
        self._run.define_metric("*", step_metric="step")

    def record(self, group: str, step: int, values: Mapping[str, float]) -> None:
        named = {f"{group}/{k}": float(v) for k, v in values.items() if k != "step"}
        self._run.log({**named, "step": step})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class Steady:
    """A recorder whose failures do not reach the training: told of once, and then left alone.

    JSON lines are tried again, for they are whole or can be mended: a disk that is full now may
    have room later.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._is_told = self._is_over = False

    def start(self, folder: Path | None, step: int) -> None:
        """Errors at the start are the user's to mend: they are raised."""
        self._recorder.start(folder, step)

    def record(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if not self._is_over:
            self._try(lambda: self._recorder.record(group, step, values))

    def close(self) -> None:
        self._try(self._recorder.close)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # of whatever package it is; the training is worth more
            self._is_over = not isinstance(self._recorder, JsonLines)
            if not self._is_told:
                self._is_told = True
                LOGGER.warning(
                    "%s fails (%s: %s); training goes on without it%s",
                    *(type(self._recorder).__name__, type(error).__name__, error),
                    "" if self._is_over else " until it works again",
                )

"""The monitor: tells people of what needs them, and turns signals into an orderly stop."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.agree import exchange
from ilm_compile.runtime.guard.stop_signals import StopSignals
from ilm_compile.runtime.hooks import Hook
from ilm_compile.runtime.metrics import StepMetrics
from ilm_compile.runtime.observe.busy import BusyClock
from ilm_compile.runtime.observe.loss_watch import LossWatch
from ilm_compile.runtime.observe.sinks import Alert, Dispatcher, LogSink, Sink
from ilm_compile.runtime.observe.slow_rank import SlowRankWatch
from ilm_compile.runtime.trainer import Trainer

_WATCH_S = 1.0
_FLUSH_S = 10.0
_LAST_LINES = 10


class Monitor(Hook):
    """Watches a training and sends an alert to `sinks` (and always to the log) when

    stuck: no step ended for `stuck_after_s` seconds, once until one ends again;
    loss-spike: a loss above `spike_ratio` times the median of the last ten;
    non-finite: a step was skipped, unless it only overflowed a loss scale;
    slow-rank: a rank computed `slow_ratio` times as long as those that do the same, measured in
    every `slow_every`-th step, which on CUDA then waits for each of its actions;
    low-disk: fewer than `min_free_bytes` are left where `folder` is, checked once a minute;
    exception: the training ended with an error; sent by the first rank to find out if `folder` is
    given, by every rank otherwise;
    stop: somebody asked to stop, such as the launcher by SIGTERM, a closed terminal by SIGHUP, or
    Ctrl-C. Training then ends after the step under way, for which hooks may save, so that the
    program can end with status 0. A second Ctrl-C ends it at once.
    late: that has not happened within `grace_s` seconds from then.

    None in place of a number switches a watch off. Alerts that are the same on every rank are sent
    by rank 0. Sending happens in a thread of its own and never stops the training.
    Raises `IlmCompileError` for limits that make no sense.
    """

    def __init__(
        self,
        *,
        job: str = "training",
        sinks: Sequence[Sink] = (),
        stuck_after_s: float | None = 300.0,
        spike_ratio: float | None = 1.5,
        slow_ratio: float | None = 1.5,
        slow_every: int = 50,
        folder: str | Path | None = None,
        min_free_bytes: int | None = 1 << 30,
        handle_signals: bool = True,
        grace_s: float = 30.0,
    ) -> None:
        for name, value, floor in (
            ("stuck_after_s", stuck_after_s, 0),
            ("spike_ratio", spike_ratio, 1),
            ("slow_ratio", slow_ratio, 1),
            ("slow_every", slow_every, 0),
            ("grace_s", grace_s, 0),
        ):
            if value is not None and not value > floor:
                raise IlmCompileError(f"monitor: {name} must be above {floor}, got {value}")
        self._job = job
        self._sinks = list(sinks)
        self._stuck_after_s = stuck_after_s
        self._spike_ratio = spike_ratio
        self._slow_ratio = slow_ratio
        self._slow_every = slow_every
        self._folder = None if folder is None else Path(folder)
        self._min_free_bytes = min_free_bytes
        self._handle_signals = handle_signals
        self._grace_s = grace_s

    def on_start(self, trainer: Trainer) -> None:
        mesh = trainer.parallel.mesh
        self._trainer = trainer
        self._rank = mesh.rank
        self._dispatcher = Dispatcher([LogSink(), *self._sinks])
        self._log = Dispatcher([LogSink()])
        self._losses = None if self._spike_ratio is None else LossWatch(self._spike_ratio)
        self._slow = None if self._slow_ratio is None else SlowRankWatch(self._slow_ratio, mesh)
        self._clock = BusyClock(trainer.parallel)
        self._is_measuring = False
        self._last_step_at = self._last_disk_check = time.monotonic()
        self._is_stuck = self._is_late = self._is_disk_low = False
        self._asked_at: float | None = None
        self._signals = StopSignals(self._on_signal)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._rank == 0:
                self._exception_file.unlink(missing_ok=True)
        self._check_disk()
        if self._handle_signals:
            self._signals.install()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="monitor", daemon=True)
        self._watcher.start()

    def on_step_start(self, trainer: Trainer, step: int) -> None:
        self._last_step_at = time.monotonic()
        if self._slow is not None and step % self._slow_every == 0:
            self._is_measuring = True
            self._clock.start()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self._last_step_at = time.monotonic()
        self._is_stuck = False
        if self._is_measuring:
            self._is_measuring = False
            self._compare_ranks()
        if trainer.stop_reason is not None:
            self._alert("stop", f"stopping: {trainer.stop_reason}")
        if self._losses is not None and (usual := self._losses.update(metrics.loss)) is not None:
            self._alert(
                "loss-spike", f"loss {metrics.loss:.4f}, median of the last steps {usual:.4f}"
            )
        if metrics.is_skipped and (trainer.scaler is None or not math.isfinite(metrics.loss)):
            self._alert(
                "non-finite",
                f"loss {metrics.loss}, gradient norm {metrics.grad_norm}: step skipped on all "
                f"ranks, {metrics.num_skipped_steps} so far",
            )

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        lines = traceback.format_exception(error)
        last = "".join(lines).splitlines()[-_LAST_LINES:]
        self._alert("exception", "\n".join(last), is_sent=self._is_first_to_fail())

    def on_stop(self, trainer: Trainer) -> None:
        if self._is_measuring:
            self._clock.stop()
        self._ended.set()
        self._signals.restore()
        self._watcher.join(_FLUSH_S)
        self._dispatcher.close(_FLUSH_S)
        self._log.close(_FLUSH_S)

    @property
    def _exception_file(self) -> Path:
        assert self._folder is not None
        return self._folder / "exception.alert"

    def _alert(self, kind: str, message: str, *, is_sent: bool | None = None) -> None:
        """Log it, and send it if `is_sent`; None: the same on every rank, so rank 0 alone does."""
        if is_sent is None and self._rank != 0:
            return
        alert = Alert(kind, message, self._job, self._rank, self._trainer.num_steps)
        (self._log if is_sent is False else self._dispatcher).put(alert)

    def _compare_ranks(self) -> None:
        assert self._slow is not None
        rows = exchange([self._clock.stop()], self._trainer.parallel.mesh)
        times = [time for (time,) in rows]
        for rank, factor in self._slow.update(times):
            self._alert(
                "slow-rank",
                f"rank {rank} computed for {times[rank]:.3f} s, {factor:.1f} times the usual",
            )

    def _is_first_to_fail(self) -> bool:
        if self._folder is None:
            return True
        try:
            self._exception_file.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # a full disk must not hide the error
            return True
        return True

    def _on_signal(self, name: str) -> None:
        self._asked_at = time.monotonic()
        self._trainer.request_stop(name)

    def _watch(self) -> None:
        pace = min(_WATCH_S, (self._stuck_after_s or _WATCH_S) / 4, self._grace_s / 4)
        while not self._ended.wait(pace):
            now = time.monotonic()
            self._check_stuck(now)
            if self._asked_at and now > self._asked_at + self._grace_s and not self._is_late:
                self._is_late = True
                self._alert(
                    "late", f"not stopped {self._grace_s:g} s after being asked to", is_sent=True
                )
            if now > self._last_disk_check + 60:
                self._check_disk()

    def _check_stuck(self, now: float) -> None:
        limit = self._stuck_after_s
        if limit is not None and now > self._last_step_at + limit and not self._is_stuck:
            self._is_stuck = True
            self._alert("stuck", f"no step ended for {limit:g} s")

    def _check_disk(self) -> None:
        """Once per node, and once until there is room again."""
        self._last_disk_check = time.monotonic()
        is_first_of_node = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if self._folder is None or self._min_free_bytes is None or not is_first_of_node:
            return
        try:
            free = shutil.disk_usage(self._folder).free
        except OSError:
            return
        is_low = free < self._min_free_bytes
        if is_low and not self._is_disk_low:
            self._alert(
                "low-disk",
                f"{free / 2**30:.2f} GiB left under {self._folder}, expected at least "
                f"{self._min_free_bytes / 2**30:.2f} GiB",
                is_sent=True,
            )
        self._is_disk_low = is_low

"""The guard around a training: a watchdog, and a record of how it ended."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from ilm_compile.config import Config
from ilm_compile.runtime import Trainer
from ilm_compile.runtime.guard.activity import ACTIVITY
from ilm_compile.runtime.guard.ending import forget_ending, record_ending
from ilm_compile.runtime.guard.report import Board
from ilm_compile.runtime.guard.run_lock import RunLock
from ilm_compile.runtime.guard.stop_signals import heed_no_second_signal
from ilm_compile.runtime.guard.watchdog import Watchdog
from ilm_compile.training.hooks import MONITOR_FOLDER
from ilm_compile.training.launch import Place, read_place

PATIENCE = 0.8  # of the time after which other ranks give up


class Guard:
    """A context manager around a training; an error in it is recorded in ``ended.json``.

    Rank 0 holds the run's folder meanwhile, and raises `RunLockError` if another job has it.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._place = read_place()
        self._watchdog: Watchdog | None = None
        self._lock: RunLock | None = None

    def __enter__(self) -> Self:
        ACTIVITY.enter("start", patient=True)
        heed_no_second_signal()
        # Before the first collective, so before any other rank of this run writes there.
        if self._place.rank == 0:
            self._lock = RunLock(self._config.run_folder)
            self._lock.take()
            forget_ending(self._config.run_folder)
        Board(self._config.run_folder / MONITOR_FOLDER).clear(self._place.rank)
        return self

    def watch(self) -> None:
        """Watch from here on, if not yet. Of a job of several processes only, and after all have
        come: by then rank 0 has cleared what the job before wrote."""
        if self._place.is_started and self._watchdog is None:
            self._watchdog = make_watchdog(self._config, self._place)
            self._watchdog.start()

    def record_success(self, trainer: Trainer) -> None:
        """Write how it ended, on rank 0."""
        how = "stopped" if trainer.stop_reason else "finished"
        reason, step = trainer.stop_reason or "", trainer.num_steps
        if self._place.rank == 0:
            record_ending(self._config.run_folder, how, rank=0, reason=reason, step=step)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            reason, rank = _in_one_line(error), self._place.rank
            step = ACTIVITY.steps_done
            record_ending(self._config.run_folder, "failed", rank=rank, reason=reason, step=step)
        if self._watchdog is not None:
            self._watchdog.stop()
        if self._lock is not None:
            self._lock.release()


def make_watchdog(config: Config, place: Place) -> Watchdog:
    """A watchdog with the limits of the config, where 0 is off; it is first to give up."""
    patience_s = PATIENCE * config.train.timeout_s
    return Watchdog(
        config.run_folder,
        config.run_folder / MONITOR_FOLDER,
        rank=place.rank,
        world_size=place.world_size,
        hang_s=min(config.monitor.hang_s, patience_s) or None,
        patience_s=patience_s,
        grace_s=config.monitor.grace_s,
    )


def _in_one_line(error: BaseException) -> str:
    lines = [f"{type(error).__name__}: {error}".splitlines()[0]]
    return "; ".join([*lines, *getattr(error, "__notes__", [])[:1]])

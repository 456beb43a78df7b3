"""The watchdog: a thread of every rank that ends a job which hangs, and one whose launcher died."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.guard.activity import ACTIVITY, Activity
from ilm_compile.runtime.guard.ending import ExitCode, record_ending
from ilm_compile.runtime.guard.report import Board, Report, Verdict, verdict
from ilm_compile.runtime.guard.siblings import end_sibling, this_process
from ilm_compile.runtime.guard.stacks import dump_stacks, main_frame, place_of, stack_text

LOGGER = logging.getLogger("ilm_compile.guard")
_PACE_S = 1.0
_GATHER_S = 5.0


class Watchdog:
    """Watches `activity` from `start` to `stop`. folder: one that all ranks share.

    hang_s: seconds without a change that are a hang, None never; patience_s: in the phases that may
    take long. On a hang every rank dumps the stacks of all its threads to the log and to
    ``stacks-RANK.txt`` in `folder`, all say what they were doing, the one at fault is named in the
    log and in ``ended.json`` of `run_folder`, and every process ends with `ExitCode.HUNG`.

    When the parent of this process dies, it gets SIGTERM, as if the launcher had asked for an
    orderly stop; after grace_s more seconds it ends with `ExitCode.ORPHANED`.

    leave: ends the process; for tests. Raises `IlmCompileError` for limits below 0.
    """

    def __init__(
        self,
        run_folder: Path,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        hang_s: float | None,
        patience_s: float,
        grace_s: float,
        activity: Activity = ACTIVITY,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        for name, value in {"hang_s": hang_s, "patience_s": patience_s, "grace_s": grace_s}.items():
            if value is not None and not value > 0:
                raise IlmCompileError(f"watchdog: {name} must be above 0, got {value}")
        self._run_folder = run_folder
        self._board = Board(folder)
        self._rank = rank
        self._world_size = world_size
        self._hang_s = hang_s
        self._patience_s = max(patience_s, hang_s or 0)
        self._grace_s = grace_s
        self._activity = activity
        self._leave = leave
        self._pace = min(_PACE_S, (hang_s or _PACE_S) / 10)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._orphan_since: float | None = None

    def start(self) -> None:
        """Every rank must have called `Board.clear` before."""
        self._parent = os.getppid()
        self._board.folder.mkdir(parents=True, exist_ok=True)
        self._board.join(this_process(self._rank))
        if not faulthandler.is_enabled():  # for crashes, and for the SIGABRT of a sibling
            faulthandler.enable(sys.stderr)
        self._thread.start()

    def stop(self) -> None:
        """End watching; returns when the thread is gone."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, since = self._activity.changes, time.monotonic()
        last = since
        while not self._ended.wait(self._pace):
            now = time.monotonic()
            # After a pause of this whole process, such as a suspended machine, all begins anew.
            was_paused = now - last > self._pace + (self._hang_s or self._pace) / 2
            last = now
            if self._activity.changes != seen or was_paused:
                seen, since = self._activity.changes, now
            self._check_parent(now)
            if self._hang_s is None:
                continue
            limit = self._patience_s if self._activity.patient else self._hang_s
            if now - since > limit or self._board.is_hung():
                self._end_the_job(now - since)

    def _check_parent(self, now: float) -> None:
        if os.getppid() == self._parent:
            return
        if self._orphan_since is None:
            self._orphan_since = now
            LOGGER.error("rank %d: the launcher died; stopping", self._rank)
            os.kill(os.getpid(), signal.SIGTERM)
        elif now - self._orphan_since > self._grace_s:
            self._leave(ExitCode.ORPHANED)

    def _end_the_job(self, seconds: float) -> None:
        frame = main_frame()
        place, waits = place_of(frame)
        own = Report(self._rank, self._activity.text(), place, waits, seconds)
        LOGGER.error("hang: %s; main thread:\n%s", own.text(), stack_text(frame))
        dump_stacks(self._board.stacks_file(self._rank))
        is_first = True
        with suppress(OSError):
            is_first = self._board.tell(own)
        # The first asks all; if it is stopped meanwhile, each of the others does.
        how = (None if is_first else self._wait_for_verdict()) or self._judge(own)
        record_ending(
            self._run_folder,
            "hung",
            rank=self._rank,
            reason=how.text,
            step=self._activity.steps_done,
        )
        LOGGER.error("hang: %s; the job ends with code %d", how.text, ExitCode.HUNG)
        for rank in how.silent:
            end_sibling(self._board.member(rank), parent=self._parent)
        sys.stderr.flush()
        self._leave(ExitCode.HUNG)

    def _wait_for_verdict(self) -> Verdict | None:
        deadline = time.monotonic() + 2 * _GATHER_S
        while (found := self._board.judged()) is None and time.monotonic() < deadline:
            time.sleep(self._pace / 2)
        return found

    def _judge(self, own: Report) -> Verdict:
        """By the reports of all ranks, or of those that answer in time."""
        reports = {self._rank: own}
        deadline = time.monotonic() + _GATHER_S
        while len(reports) < self._world_size and time.monotonic() < deadline:
            reports |= self._board.reports(set(range(self._world_size)) - set(reports))
            time.sleep(self._pace / 2)
        how = verdict(reports, self._world_size)
        with suppress(OSError):
            self._board.judge(how)
        return how

"""The watchdog's parts: what it notices, whom it names, whom it ends, what it writes."""

import inspect
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.guard import watchdog
from ilm_compile.runtime.guard.activity import Activity
from ilm_compile.runtime.guard.ending import (
    ExitCode,
    forget_ending,
    read_ending,
    record_ending,
)
from ilm_compile.runtime.guard.report import Board, Member, Report, Verdict, verdict
from ilm_compile.runtime.guard.siblings import end_sibling, this_process
from ilm_compile.runtime.guard.stacks import place_of
from ilm_compile.runtime.guard.watchdog import Watchdog

BUSY = Report(1, "step 5, 1F0", "a/b.py:3 in f", waits=False, seconds=12.3)
WAITING = Report(0, "step 5, wait 0B0", "runtime/p2p.py:4 in wait", waits=True, seconds=12.0)
LATER = Report(2, "step 5, loss", "torch/x.py:1 in all_reduce", waits=True, seconds=11.0)


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        ([WAITING, BUSY, LATER], "rank 1: busy in step 5, 1F0, 12 s, at a/b.py:3 in f; rank 0: w"),
        ([WAITING, LATER], "rank 1: does not answer (stopped or gone); rank 0: waiting in step 5"),
        ([WAITING, Report(1, "x", "y", True, 9), LATER], "every rank waits; rank 0: waiting in"),
    ],
    ids=["busy", "silent", "circle"],
)
def test_the_rank_at_fault_is_named_first(reports: list[Report], said: str) -> None:
    assert verdict({report.rank: report for report in reports}, 3).text.startswith(said)


def test_a_rank_that_waits_is_told_from_one_that_computes() -> None:
    code = compile("frame = inspect.currentframe()", "/x/torch/distributed/group.py", "exec")
    names: dict[str, Any] = {"inspect": inspect}
    exec(code, names)
    assert place_of(names["frame"]) == ("distributed/group.py:1 in <module>", True)
    place, waits = place_of(inspect.currentframe())
    assert place.startswith("runtime/test_guard.py:")
    assert not waits


def test_a_phase_within_another_goes_back_to_it() -> None:
    activity = Activity()
    activity.enter("step 5")
    with activity.during("saving"):
        assert activity.text() == "step 5: saving"
        assert activity.patient
    assert activity.text() == "step 5"
    assert not activity.patient
    activity.do("1F0")
    assert activity.text() == "step 5, 1F0"


def test_an_error_leaves_the_phase_that_it_came_from() -> None:
    activity = Activity()
    with pytest.raises(KeyError), activity.during("saving"):
        raise KeyError
    assert activity.text() == "start: saving"


def test_the_first_ending_stays_until_the_next_run(tmp_path: Path) -> None:
    assert read_ending(tmp_path) is None
    record_ending(tmp_path, "failed", rank=1, reason="first")
    record_ending(tmp_path, "failed", rank=0, reason="second")
    found = read_ending(tmp_path)
    assert found is not None
    assert (found["how"], found["rank"]) == ("failed", 1)
    assert found["reason"] == "first"
    forget_ending(tmp_path)
    assert read_ending(tmp_path) is None


class Watched:
    """A watchdog of one rank of two whose way out is noted instead of taken."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.codes: list[int] = []
        self.activity = Activity()
        self.activity.enter("step 3")
        self.board = Board(folder / "monitor")
        self.watchdog = Watchdog(
            folder,
            folder / "monitor",
            rank=0,
            world_size=2,
            activity=self.activity,
            leave=self._leave,
            **{"hang_s": 0.3, "patience_s": 60.0, "grace_s": 0.3, **limits},
        )

    def _leave(self, code: int) -> None:
        self.codes.append(code)
        self.watchdog._ended.set()

    def wait(self, seconds: float = 10.0) -> list[int]:
        """The codes, once there is one or the time is over."""
        deadline = time.monotonic() + seconds
        while not self.codes and time.monotonic() < deadline:
            time.sleep(0.02)
        return self.codes


def test_a_hang_ends_the_process_with_its_code_and_dumps_all_stacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ilm_compile.runtime.guard.watchdog._GATHER_S", 0.2)
    watched = Watched(tmp_path)
    watched.board.folder.mkdir()
    watched.board.tell(Report(1, "step 3, 1F0", "x", waits=False, seconds=1))
    watched.watchdog.start()
    assert watched.wait() == [ExitCode.HUNG]
    watched.watchdog.stop()
    stacks = watched.board.stacks_file(0).read_text()
    assert stacks.count("hread 0x") > 1
    assert "test_guard.py" in stacks
    assert "watchdog.py" in stacks
    ending = read_ending(tmp_path)
    assert ending is not None
    assert ending["how"] == "hung"
    assert "rank 1: busy in step 3, 1F0" in ending["reason"]


@pytest.mark.parametrize("keeps", ["moving", "being patient", "unwatched"])
def test_no_hang_where_there_is_none(keeps: str, tmp_path: Path) -> None:
    watched = Watched(tmp_path, **({"hang_s": None} if keeps == "unwatched" else {}))
    watched.activity.patient = keeps == "being patient"
    watched.watchdog.start()
    for _ in range(20):
        time.sleep(0.05)
        if keeps == "moving":
            watched.activity.do("1F0")
    watched.watchdog.stop()
    assert watched.codes == []


def test_patience_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ilm_compile.runtime.guard.watchdog._GATHER_S", 0.1)
    watched = Watched(tmp_path, patience_s=0.4)
    watched.activity.enter("reading", patient=True)
    watched.watchdog.start()
    assert watched.wait() == [ExitCode.HUNG]
    ending = read_ending(tmp_path)
    assert ending is not None
    assert ending["reason"].startswith("rank 1: does not answer (stopped or gone); rank 0: busy")


def test_the_hang_of_one_rank_ends_those_that_are_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ilm_compile.runtime.guard.watchdog._GATHER_S", 0.2)
    watched = Watched(tmp_path, hang_s=60.0)
    watched.activity.patient = True
    watched.watchdog.start()
    watched.board.tell(Report(1, "step 3, 1F0", "x", waits=False, seconds=1))
    assert watched.wait() == [ExitCode.HUNG]


def test_a_machine_that_slept_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + slept[0], sleep=time.sleep)
    monkeypatch.setattr(watchdog, "time", clock)
    watched = Watched(tmp_path, hang_s=2.0)
    watched.watchdog.start()
    time.sleep(0.3)
    slept[0] = 100.0
    time.sleep(0.6)
    watched.watchdog.stop()
    assert watched.codes == []


def test_a_process_whose_parent_died_stops_in_order_then_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    watched = Watched(tmp_path, hang_s=None)
    try:
        watched.watchdog.start()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert watched.wait() == [ExitCode.ORPHANED]
    finally:
        watched.watchdog.stop()
        signal.signal(signal.SIGTERM, before)
    assert asked == [signal.SIGTERM]


def test_limits_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IlmCompileError, match="hang_s must be above 0, got -1"):
        Watched(tmp_path, hang_s=-1)


def test_a_new_run_forgets_the_hang_before(tmp_path: Path) -> None:
    board = Board(tmp_path)
    board.join(this_process(0))
    board.tell(BUSY)
    assert board.is_hung()
    assert board.member(0) == this_process(0)
    assert board.reports(range(3)) == {1: BUSY}
    for rank in range(2):
        board.clear(rank)
    assert not board.is_hung()
    assert board.reports(range(3)) == {}


def test_a_watchdog_looks_for_one_file_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank does every second, so what it looks at must not grow with the ranks."""
    seen: list[str] = []
    watched = Watched(tmp_path, hang_s=1.0)
    watched.watchdog.start()
    for rank in range(1, 50):
        watched.board.join(Member(rank, 1, "elsewhere"))
    for name in ("glob", "iterdir", "read_text"):
        monkeypatch.setattr(Path, name, lambda path, *_, name=name: seen.append(f"{name} {path}"))
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: seen.append(path.name) or exists(path))
    time.sleep(0.5)
    watched.activity.do("1F0")
    watched.watchdog.stop()
    assert set(seen) == {"hang"}


def test_one_rank_reads_the_reports_and_the_others_what_it_found(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.board.folder.mkdir()
    assert watched.board.tell(BUSY)
    watched.board.judge(Verdict("rank 7 did it", []))
    watched.watchdog.start()
    assert watched.wait() == [ExitCode.HUNG]
    ending = read_ending(tmp_path)
    assert ending is not None
    assert ending["reason"] == "rank 7 did it"


def test_only_a_sibling_is_ended_even_if_it_is_stopped() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    os.kill(child.pid, signal.SIGSTOP)
    here = socket.gethostname()
    assert not end_sibling(None, parent=os.getpid())
    assert not end_sibling(Member(1, child.pid, here), parent=1)
    assert not end_sibling(Member(1, child.pid, "elsewhere"), parent=os.getpid())
    assert child.poll() is None
    assert end_sibling(Member(1, child.pid, here), parent=os.getpid())
    assert child.wait(10) in (-signal.SIGKILL, -signal.SIGABRT)

"""What each rank tells the others of a hang, through files, and whose fault it is.

Files because a process whose main thread is stuck in a collective cannot use another collective.
Until then a rank looks for one file by its name; in a hang one rank reads the reports of all.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ilm_compile.files import read_as, write_text


@dataclass(frozen=True, slots=True)
class Member:
    """A process of the job: where it is, for those on the same host."""

    rank: int
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank was doing when somebody noticed a hang.

    activity: in words. place: file, line and function of its main thread. waits: that is a
    collective or a receive. seconds: since anything moved there.
    """

    rank: int
    activity: str
    place: str
    waits: bool
    seconds: float

    def text(self) -> str:
        """For people."""
        how = "waiting" if self.waits else "busy"
        return f"rank {self.rank}: {how} in {self.activity}, {self.seconds:.0f} s, at {self.place}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who hangs, in one line, and the ranks that answer no more."""

    text: str
    silent: list[int]


class Board:
    """The files of a job's ranks in one folder that all share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self, rank: int) -> None:
        """Forget the run before. By every rank for itself, and rank 0 for all, before any watches.

        Who a rank was stays until it joins: another job in the folder may still be at work.
        """
        for path in [self._report(rank), *([self._marker, self._verdict] if rank == 0 else [])]:
            path.unlink(missing_ok=True)

    def stacks_file(self, rank: int) -> Path:
        """Where a rank's stacks go."""
        return self.folder / f"stacks-{rank:05d}.txt"

    def join(self, member: Member) -> None:
        """Say which process a rank is."""
        write_text(self.folder / f"rank-{member.rank:05d}.json", json.dumps(asdict(member)))

    def member(self, rank: int) -> Member | None:
        """The process of a rank, None if it never said."""
        return read_as(Member, self.folder / f"rank-{rank:05d}.json")

    def tell(self, report: Report) -> bool:
        """Report a hang, which makes all ranks report; returns whether this rank was the first."""
        write_text(self._report(report.rank), json.dumps(asdict(report)))
        try:
            self._marker.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def is_hung(self) -> bool:
        """Whether any rank has reported."""
        return self._marker.exists()

    def reports(self, ranks: Iterable[int]) -> dict[int, Report]:
        """Those so far of these ranks."""
        found = {rank: read_as(Report, self._report(rank)) for rank in ranks}
        return {rank: report for rank, report in found.items() if report is not None}

    def judge(self, how: Verdict) -> None:
        """Write what the one who read all reports found."""
        write_text(self._verdict, json.dumps(asdict(how)))

    def judged(self) -> Verdict | None:
        """What was found, None if nothing is yet."""
        return read_as(Verdict, self._verdict)

    def _report(self, rank: int) -> Path:
        return self.folder / f"hang-{rank:05d}.json"

    @property
    def _marker(self) -> Path:
        return self.folder / "hang"

    @property
    def _verdict(self) -> Path:
        return self.folder / "verdict.json"


def verdict(reports: Mapping[int, Report], world_size: int) -> Verdict:
    """Who hangs.

    Ranks that answer no more come first; then those that were busy while the others waited. Where
    all wait, each for another, all are named.
    """
    silent = [rank for rank in range(world_size) if rank not in reports]
    busy = [report for _, report in sorted(reports.items()) if not report.waits]
    waiting = [report for _, report in sorted(reports.items()) if report.waits]
    if silent:
        names = ", ".join(f"rank {rank}: does not answer (stopped or gone)" for rank in silent)
        return Verdict(f"{names}; {_few(waiting or busy)}", silent)
    if busy:
        return Verdict(f"{_few(busy)}; {_few(waiting)}" if waiting else _few(busy), [])
    return Verdict(f"every rank waits; {_few(waiting, most=world_size)}", [])


def _few(reports: Iterable[Report], *, most: int = 2) -> str:
    listed = list(reports)
    more = f"; and {len(listed) - most} more" if len(listed) > most else ""
    return "; ".join(report.text() for report in listed[:most]) + more

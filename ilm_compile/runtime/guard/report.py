"""What each rank tells the others of a hang, through files, and whose fault it is.

Files because a process whose main thread is stuck in a collective cannot use another collective.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ilm_compile.files import write_text


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


class Board:
    """The files of a job's ranks in one folder that all share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Forget the run before. By rank 0, before any rank writes."""
        for path in [*self.folder.glob("rank-*.json"), *self.folder.glob("hang-*.json")]:
            path.unlink(missing_ok=True)

    def stacks_file(self, rank: int) -> Path:
        """Where a rank's stacks go."""
        return self.folder / f"stacks-{rank:05d}.txt"

    def join(self, member: Member) -> None:
        """Say which process a rank is."""
        write_text(self.folder / f"rank-{member.rank:05d}.json", json.dumps(asdict(member)))

    def member(self, rank: int) -> Member | None:
        """The process of a rank, None if it never said."""
        try:
            return Member(**json.loads((self.folder / f"rank-{rank:05d}.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def tell(self, report: Report) -> None:
        """Report a hang, which makes all ranks report."""
        write_text(self.folder / f"hang-{report.rank:05d}.json", json.dumps(asdict(report)))

    def is_hung(self) -> bool:
        """Whether any rank has reported."""
        return next(self.folder.glob("hang-*.json"), None) is not None

    def reports(self) -> dict[int, Report]:
        """Those so far, by rank."""
        found = (Report(**json.loads(p.read_text())) for p in self.folder.glob("hang-*.json"))
        return {report.rank: report for report in found}


def verdict(reports: Mapping[int, Report], world_size: int) -> str:
    """Who hangs, in one line.

    Ranks that answer no more come first; then those that were busy while the others waited. Where
    all wait, each for another, all are named.
    """
    silent = [rank for rank in range(world_size) if rank not in reports]
    busy = [report for _, report in sorted(reports.items()) if not report.waits]
    waiting = [report for _, report in sorted(reports.items()) if report.waits]
    if silent:
        names = ", ".join(f"rank {rank}: does not answer (stopped or gone)" for rank in silent)
        return f"{names}; {_few(waiting or busy)}"
    if busy:
        return f"{_few(busy)}; {_few(waiting)}" if waiting else _few(busy)
    return f"every rank waits; {_few(waiting, most=world_size)}"


def _few(reports: Iterable[Report], *, most: int = 2) -> str:
    listed = list(reports)
    more = f"; and {len(listed) - most} more" if len(listed) > most else ""
    return "; ".join(report.text() for report in listed[:most]) + more

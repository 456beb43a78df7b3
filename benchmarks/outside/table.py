"""The table of `benchmarks.outside_models`: one line a model, and one a source."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import markdown
from benchmarks.outside.train import Trained

HEADINGS = ("model", "source", "parameters", "plan", "partition", "proof", "loss", "weights", "")
SOURCE_HEADINGS = (
    *("source", "models", "equal", "rightly refused", "failed", "loss", "weights"),
    *("partition, median", "proof, median"),
)
NOT_TRIED = "-"
LONGEST = 160  # characters of a reason in the table; the whole is in the JSON


@dataclass(frozen=True)
class Row:
    """One model under its plan. `refused` says why `partition` did not take it, if so."""

    model: str
    source: str
    plan: str
    parameters: int
    partition_s: float
    refused: str
    tolerance: float
    refusal: str = ""  # why it is right that it is refused, if so
    reason: str = ""  # of a tolerance that is not the default
    proof: str = NOT_TRIED  # or "equal", or the first failure
    proof_s: float = 0.0
    trained: Trained | None = None

    @classmethod
    def read(cls, saved: dict[str, Any]) -> Row:
        """Return the row of its saved fields; others are passed over."""
        fields = {name: saved[name] for name in cls.__dataclass_fields__}
        trained = fields.pop("trained")
        return cls(**fields, trained=Trained(**trained) if trained else None)

    @property
    def ok(self) -> bool:
        """Whether what was tried agrees, or it is refused as it must be."""
        if self.refused or self.refusal:
            return bool(self.refused and self.refusal)
        trains = self.trained is None or self.trained.agrees(self.tolerance)
        return self.proof in ("equal", NOT_TRIED) and trains

    def cells(self) -> list[str]:
        """Return the line of the table, as `HEADINGS` names its columns."""
        if self.refused:
            note = self.refusal or f"WRONGLY: {self.refused}"
            return self._head("refused", "", "", "", _short(note))
        is_proved = self.proof in ("equal", NOT_TRIED)
        proof = f"{self.proof}, {self.proof_s:.1f} s" if self.proof == "equal" else self.proof
        trained = self.trained or Trained()
        errors = (trained.loss_error, trained.weight_error)
        return self._head(
            f"{self.partition_s:.1f} s",
            proof if is_proved else "NOT PROVED",
            *("" if error is None else f"{error:.0e}" for error in errors),
            _short("; ".join(self._notes(is_proved))),
        )

    def _notes(self, is_proved: bool) -> Iterator[str]:
        if not is_proved:
            yield self.proof
        if self.trained is not None and not self.trained.agrees(self.tolerance):
            yield self.trained.difference()
        if self.reason:
            yield self.reason

    def _head(self, *rest: str) -> list[str]:
        return [self.model, self.source, f"{self.parameters:,}", self.plan, *rest]


def _short(text: str) -> str:
    first = " ".join(text.split())
    return first if len(first) <= LONGEST else first[: LONGEST - 3] + "..."


def without_folders(text: str) -> str:
    """Return `text` with files of this checkout and of packages named from there on."""
    root = str(Path(__file__).resolve().parents[2])
    return re.sub(r"/[^\s:(]*/site-packages/", "", text.replace(f"{root}/", ""))


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def summary(rows: Sequence[Row]) -> str:
    """Return the counts, and the names of those that are neither equal nor rightly refused."""
    refused = sum(row.ok and bool(row.refused) for row in rows)
    failed = [row.model for row in rows if not row.ok]
    equal = len(rows) - refused - len(failed)
    text = f"{len(rows)} models: {equal} equal, {refused} rightly refused, {len(failed)} failed"
    return f"{text}: {'; '.join(failed)}" if failed else text


def by_source(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table of the counts, largest errors and median seconds of each source."""
    yield from markdown(SOURCE_HEADINGS, ()).splitlines()
    for source in dict.fromkeys(row.source for row in rows):
        mine = [row for row in rows if row.source == source]
        equal = [row for row in mine if row.ok and not row.refused]
        counts = (len(mine), len(equal), sum(row.ok for row in mine) - len(equal))
        cells = [source, *map(str, counts), str(sum(not row.ok for row in mine))]
        trained = [row.trained for row in equal if row.trained is not None]
        cells += [f"{max((one.loss_error or 0.0 for one in trained), default=0.0):.0e}"]
        cells += [f"{max((one.weight_error or 0.0 for one in trained), default=0.0):.0e}"]
        for seconds in ([row.partition_s for row in equal], [row.proof_s for row in equal]):
            cells.append(f"{median(seconds):.1f} s" if any(seconds) else "")
        yield table_line(cells)

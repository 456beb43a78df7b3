"""Bubble rates of pipeline schedules from the times of a stage: `python -m benchmarks.simulate`.

Reads a CSV file with the columns

id                  names the row; no two are equal
schedule            a name that a plan takes
p, m, chunks        ranks, micro-batches, stages per rank
t_f, t_b, t_w       milliseconds one micro-batch takes on one rank: forward, gradient of the input,
                    gradients of the weights; each of the rank's chunks takes its equal share
t_comm              milliseconds of one message, sent while the ranks compute

and writes id and bubble_rate = 1 - m (t_f + t_b + t_w) / cost, as the Zero Bubble paper defines it
(arXiv 2401.10241). The cost is the longest time of a rank, from its first action to
its last. That is the makespan, except where the rank that ends last also began late, as in zb_h2.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import make_parser, write_csv
from ilm_compile.errors import ScheduleError
from ilm_compile.schedule import Schedule, StageTimes, build, known_schedules, simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the input; the fields are its columns."""

    id: str
    schedule: str
    p: int
    m: int
    chunks: int
    t_f: float
    t_b: float
    t_w: float
    t_comm: float

    @property
    def sizes(self) -> tuple[str, int, int, int]:
        return self.schedule, self.p, self.m, self.chunks


def _name(text: str) -> str:
    if not text:
        raise ValueError("a name")
    return text


def _schedule(text: str) -> str:
    if text not in known_schedules():
        raise ValueError(f"one of {', '.join(known_schedules())}")
    return text


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError("a whole number of at least 1")
    return int(text)


def _time(text: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if not (math.isfinite(time) and time >= 0):
        raise ValueError("a finite number of milliseconds, at least 0")
    return time


def _positive_time(text: str) -> float:
    if not (time := _time(text)):
        raise ValueError("more than 0 milliseconds")
    return time


COLUMNS: dict[str, Callable[[str], str | int | float]] = {
    "id": _name,
    "schedule": _schedule,
    **dict.fromkeys(("p", "m", "chunks"), _count),
    **dict.fromkeys(("t_f", "t_b"), _positive_time),
    **dict.fromkeys(("t_w", "t_comm"), _time),
}


def read_rows(path: Path) -> list[Row]:
    """The rows of the file, all of them looked at; SystemExit names the first bad row and column.

    Columns that are not in `COLUMNS` are skipped.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        header = reader.fieldnames or []
        for column in COLUMNS:
            if (found := list(header).count(column)) != 1:
                raise SystemExit(
                    f"{path}: expected the column {column!r} once, found it {found} times; the "
                    f"first line must name {', '.join(COLUMNS)}"
                )
        rows: dict[str, Row] = {}
        for line in reader:
            where = f"{path}:{reader.line_num}"
            if None in line or None in line.values():
                raise SystemExit(
                    f"{where}: expected {len(header)} cells as in the first line, got "
                    f"{sum(v is not None for k, v in line.items() if k) + len(line.get(None, []))}"
                )
            row = _row(where, line)
            if row.id in rows:
                raise SystemExit(f"{where}, column 'id': {row.id!r} names an earlier row too")
            rows[row.id] = row
    if not rows:
        raise SystemExit(f"{path}: expected at least one row below the first line, got none")
    return list(rows.values())


def _row(where: str, line: dict[str, str]) -> Row:
    values = {}
    for column, parse in COLUMNS.items():
        text = line[column].strip()
        try:
            values[column] = parse(text)
        except ValueError as error:
            raise SystemExit(
                f"{where}, row {line['id'].strip()!r}, column {column!r}: expected {error}, "
                f"got {text!r}"
            ) from None
    return Row(**values)


def build_all(path: Path, rows: Sequence[Row]) -> dict[tuple[str, int, int, int], Schedule]:
    """The schedules of all rows, each built once, by `Row.sizes`."""
    schedules: dict[tuple[str, int, int, int], Schedule] = {}
    for row in rows:
        if row.sizes in schedules:
            continue
        try:
            schedules[row.sizes] = build(
                row.schedule, pp=row.p, num_microbatches=row.m, num_chunks=row.chunks
            )
        except ScheduleError as error:
            raise SystemExit(
                f"{path}, row {row.id!r}, columns 'schedule', 'p', 'm' and 'chunks': {error}"
            ) from None
    return schedules


def bubble_rate(row: Row, schedule: Schedule) -> float:
    """That of the row, whose schedule is `schedule`."""
    times = StageTimes(
        forward=row.t_f / row.chunks,
        backward=row.t_b / row.chunks,
        weight=row.t_w / row.chunks,
        message=row.t_comm,
    )
    cost = simulate(schedule, [times] * schedule.num_stages).cost
    return 1 - row.m * (row.t_f + row.t_b + row.t_w) / cost


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("simulate", __doc__)
    parser.add_argument("rows", type=Path, metavar="ROWS.csv")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.csv")
    options = parser.parse_args(arguments)

    if options.output.is_dir():
        raise SystemExit(f"--output {options.output}: expected a file, got a folder")
    try:
        rows = read_rows(options.rows)
    except (OSError, UnicodeError, csv.Error) as error:
        raise SystemExit(f"{options.rows}: expected a CSV file in UTF-8: {error}") from None
    schedules = build_all(options.rows, rows)
    rates = ((row.id, bubble_rate(row, schedules[row.sizes])) for row in rows)
    lines = [(name, f"{round(rate, 9) + 0.0:.9f}") for name, rate in rates]  # no "-0.0"
    write_csv(options.output, ("id", "bubble_rate"), lines)


if __name__ == "__main__":
    main()

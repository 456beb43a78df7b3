"""Predict published training steps: `python -m benchmarks.predict ROWS.csv --output OUT.csv`.

Reads rows as `benchmarks.step_rows` describes them and writes id, predicted_s and
predicted_memory_gb (2**30 bytes). What was assumed of a row is said on stderr, once for each
assumption. A row that cannot be read is left blank and said on stderr; if none can, the exit status
is 1. With --errors, what rows say of their measured time and memory is compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.common import make_parser, write_csv
from benchmarks.step_errors import show_errors
from benchmarks.step_rows import RowError, Step, read_rows, read_step
from ilm_compile.errors import IlmCompileError


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, or 1 if no row could be read."""
    parser = make_parser("predict", __doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.csv")
    parser.add_argument("--errors", action="store_true", help="compare with what was measured")
    options = parser.parse_args(arguments)
    try:
        rows = read_rows(options.rows)
    except (OSError, RowError) as error:
        print(f"predict: {error}", file=sys.stderr)
        return 1

    found: list[Step] = []
    notes: dict[str, list[str]] = {}
    left_blank = 0
    lines: list[tuple[str, str, str]] = []
    for row in rows:
        try:
            step = read_step(row)
            seconds, gigabytes = step.predicted_s, step.predicted_gb
        except IlmCompileError as error:
            print(f"predict: row {row['id']}: {error}", file=sys.stderr)
            lines.append((row["id"], "", ""))
            left_blank += 1
            continue
        lines.append((step.id, f"{seconds:.6g}", f"{gigabytes:.4g}"))
        found.append(step)
        for note in step.notes:
            notes.setdefault(note, []).append(step.id)
    write_csv(options.output, ("id", "predicted_s", "predicted_memory_gb"), lines)
    for note, ids in notes.items():
        print(f"predict: {note} ({len(ids)} rows, {ids[0]} first)", file=sys.stderr)
    if left_blank:
        print(f"predict: {left_blank} of {len(rows)} rows left blank", file=sys.stderr)
    if options.errors:
        _compare(found)
    return 0 if found else 1


def _compare(steps: Sequence[Step]) -> None:
    show_errors("time", steps, [step.predicted_s for step in steps])
    memory = [abs(s.predicted_gb / s.gigabytes - 1) for s in steps if s.gigabytes]
    if memory:
        print(f"memory: median error {median(memory):.1%} of {len(memory)} rows")


if __name__ == "__main__":
    sys.exit(main())

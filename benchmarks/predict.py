"""Predict published training steps: `python -m benchmarks.predict ROWS.csv --output OUT.csv`.

Reads rows as `benchmarks.step_rows` describes them and writes id, predicted_s and
predicted_memory_gb (2**30 bytes). What was assumed of a row is said on stderr, once for each
assumption. A row that cannot be read is left blank and said on stderr; if none can, the exit status
is 1. With --errors, what rows say of their measured time and memory is compared.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.console import Console

from benchmarks.common import make_parser
from benchmarks.step_errors import Errors, error_table, regret
from benchmarks.step_rows import RowError, Step, read_rows, read_step
from ilm_compile.cost.step_memory import step_memory
from ilm_compile.cost.step_time import step_time
from ilm_compile.errors import IlmCompileError
from ilm_compile.files import write_text

GIB = 2**30


def predict(step: Step) -> tuple[float, float]:
    """The seconds of a step and the gigabytes (of 2**30 bytes) of its fullest rank."""
    seconds = step_time(step.sizes, step.plan, step.hardware, step.software).total
    return seconds, step_memory(step.sizes, step.plan, step.software).total / GIB


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

    found: list[tuple[Step, tuple[float, float]]] = []
    notes: dict[str, list[str]] = {}
    left_blank = 0
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(("id", "predicted_s", "predicted_memory_gb"))
    for row in rows:
        try:
            step = read_step(row)
            seconds, gigabytes = predict(step)
        except IlmCompileError as error:
            print(f"predict: row {row['id']}: {error}", file=sys.stderr)
            writer.writerow((row["id"], "", ""))
            left_blank += 1
            continue
        writer.writerow((step.id, f"{seconds:.6g}", f"{gigabytes:.4g}"))
        found.append((step, (seconds, gigabytes)))
        for note in step.notes:
            notes.setdefault(note, []).append(step.id)
    write_text(options.output, target.getvalue())
    for note, ids in notes.items():
        print(f"predict: {note} ({len(ids)} rows, {ids[0]} first)", file=sys.stderr)
    if left_blank:
        print(f"predict: {left_blank} of {len(rows)} rows left blank", file=sys.stderr)
    if options.errors:
        _compare(found)
    return 0 if found else 1


def _compare(found: Sequence[tuple[Step, tuple[float, float]]]) -> None:
    console = Console()
    steps, seconds = [step for step, _ in found], [predicted for _, (predicted, _) in found]
    console.print(error_table("time", Errors(steps, seconds)))
    memory = [
        abs(predicted / step.gigabytes - 1) for step, (_, predicted) in found if step.gigabytes
    ]
    if memory:
        console.print(f"memory: median error {median(memory):.1%} of {len(memory)} rows")
    console.print(f"regret: {regret(steps, seconds):.1%}")


if __name__ == "__main__":
    sys.exit(main())

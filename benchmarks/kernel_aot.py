"""What the compiler makes of every Triton kernel: `python -m benchmarks.kernel_aot`.

Each kernel is compiled ahead of time for each GPU, from a real call of its launcher; no GPU is
needed, and nothing is timed. What the columns say:

registers          per thread
spilled            bytes of local memory per thread: registers that did not fit
shared             bytes of shared memory per program
load               bytes that the widest load from global memory moves per thread; 16 is the most
narrow             loads and stores that move fewer than 16 bytes
prefetch           asynchronous copies (cp.async) of a pipelined loop
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import triton
from rich.table import Table

from benchmarks.ahead_of_time import Report, compile_kernels
from benchmarks.common import RESULTS, make_console, make_parser, save_json
from benchmarks.kernel_samples import SAMPLES

ARCHITECTURES = (80, 90, 100)


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel at a width: hidden size, intermediate size or whatever `meaning` says."""

    sample: str
    meaning: str
    width: int
    report: Report


def compile_samples(names: Sequence[str], architectures: Sequence[int]) -> Iterator[Row]:
    """A row for each kernel that a sample's launcher launches, width and architecture."""
    for name in names:
        sample = SAMPLES[name]
        for width in sample.widths:
            for arch in architectures:
                for report in compile_kernels(partial(sample.call, width), arch):
                    yield Row(name, sample.meaning, width, report)


def table(rows: Sequence[Row]) -> Table:
    """The rows for a console."""
    columns = "kernel, width, sm, warps, registers, spilled, shared, load, narrow, prefetch"
    found = Table(title="Triton kernels compiled ahead of time, bf16", box=None)
    for column in columns.split(", "):
        found.add_column(column, justify="left" if column == "kernel" else "right")
    for row in rows:
        report = row.report
        cells = (
            f"{row.meaning} {row.width}",
            report.arch,
            report.warps,
            report.registers,
            report.spilled,
            report.shared,
            report.widest_load,
            report.narrow_loads + report.narrow_stores,
            report.async_copies,
        )
        found.add_row(row.sample, *map(str, cells))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, print the table, write the JSON."""
    parser = make_parser("kernel_aot", __doc__)
    parser.add_argument("--only", choices=SAMPLES, nargs="*", default=list(SAMPLES))
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, help="80, 90, 100")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernel_aot.json")
    options = parser.parse_args(arguments)
    rows = list(compile_samples(options.only, options.arch))
    make_console().print(table(rows))
    save_json(options.output, {"triton": triton.__version__, "kernels": rows})


if __name__ == "__main__":
    main()

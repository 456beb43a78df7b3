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
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import triton

from benchmarks.ahead_of_time import compile_kernels
from benchmarks.common import RESULTS, make_parser, save_json, show_table
from benchmarks.kernel_samples import SAMPLES

ARCHITECTURES = (80, 90, 100)


def compile_samples(names: Sequence[str], architectures: Sequence[int]) -> Iterator[dict[str, Any]]:
    """A row for each kernel that a sample's launcher launches, width and architecture.

    width: hidden size, intermediate size or whatever `meaning` says.
    """
    for name in names:
        sample = SAMPLES[name]
        row = {"sample": name, "meaning": sample.meaning}
        for width, arch in product(sample.widths, architectures):
            for report in compile_kernels(partial(sample.call, width), arch):
                yield row | {"width": width, "report": report}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows."""
    lines = []
    for row in rows:
        r = row["report"]
        sizes = (r.arch, r.warps, r.registers, r.spilled, r.shared, r.widest_load)
        narrow = r.narrow_loads + r.narrow_stores
        width = f"{row['meaning']} {row['width']}"
        lines.append((row["sample"], width, *sizes, narrow, r.async_copies))
    columns = "kernel, width, sm, warps, registers, spilled, shared, load, narrow, prefetch"
    show_table("Triton kernels compiled ahead of time, bf16", columns.split(", "), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, print the table, write the JSON."""
    parser = make_parser("kernel_aot", __doc__)
    parser.add_argument("--only", choices=SAMPLES, nargs="*", default=list(SAMPLES))
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, help="80, 90, 100")
    parser.add_argument("--output", type=Path, default=RESULTS / "kernel_aot.json")
    options = parser.parse_args(arguments)
    rows = list(compile_samples(options.only, options.arch))
    show(rows)
    save_json(options.output, {"triton": triton.__version__, "kernels": rows})


if __name__ == "__main__":
    main()

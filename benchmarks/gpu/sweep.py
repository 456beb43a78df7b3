"""Launch choices for the backward of rms_norm, timed: to tune the table in `kernels` again.

`python -m benchmarks.gpu.run_all --sweep` prints the fastest of each width, and marks the one that
the table has.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from unittest import mock

import torch

from benchmarks.common import show_table
from benchmarks.gpu.bandwidth import WIDTHS
from benchmarks.gpu.failure import Deadline, Result
from benchmarks.gpu.ops import TIMED
from benchmarks.gpu.ops.op import EPS, Tensors, maker
from benchmarks.gpu.pool import compile_ahead
from benchmarks.gpu.timing import copy_bandwidth, measure
from ilm_compile.kernels import triton_norm
from ilm_compile.kernels.launch import Launch, launch_for

ROWS = 16384
SMOKE_ROWS = 32
WARPS = (4, 8, 16, 32)
STAGES = (1, 2, 3)
PROGRAMS = (1, 2, 3, 4, 6, 8)
MIN_REGISTERS = 32  # a thread needs more than fewer
SHOWN = 8
TIME_S = 380.0
PREPARE_S = 150.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A launch at a width. fraction: of the copy's bandwidth; 0 where it does not run: fault."""

    width: int
    launch: Launch
    in_table: bool
    fraction: float
    fault: str | None = None


def sweep(device: torch.device, smoke: bool, result: Result) -> None:
    """The fractions of all choices at hidden sizes 2048 to 8192, the fastest first."""
    deadline = Deadline(TIME_S)
    tasks = [(width, launch, device, smoke) for width in WIDTHS for launch in candidates(width)]
    if smoke:
        tasks = tasks[:3]
    compile_ahead(compile_once, tasks, device, PREPARE_S)
    copy = copy_bandwidth(device, smoke=smoke)
    found: list[Choice] = []
    result |= {"rows": SMOKE_ROWS if smoke else ROWS, "copy_gb_per_s": copy * 1e-9}
    result["choices"] = found
    found.extend(_time(*task, copy) for task in tasks if not deadline.passed)
    result["untimed"] = len(tasks) - len(found)
    found.sort(key=lambda choice: (choice.width, -choice.fraction))
    _show(found)


def candidates(width: int) -> Iterator[Launch]:
    """Every launch that leaves a thread enough registers; the table's first. A row is in pieces as
    the table has it, or whole, with lanes that idle where its width is no power of two."""
    known = launch_for(triton_norm.BACKWARD, width)
    yield known
    shapes = dict.fromkeys([(known.block, known.pieces), (1 << (width - 1).bit_length(), 1)])
    for (block, pieces), warps, stages, programs in product(shapes, WARPS, STAGES, PROGRAMS):
        launch = Launch(
            block=block,
            pieces=pieces,
            rows=1,
            warps=warps,
            programs_per_sm=programs,
            stages=stages,
        )
        if launch != known and launch.max_registers >= MIN_REGISTERS:
            yield launch


def _run(width: int, launch: Launch, device: torch.device, rows: int, copy: float | None) -> float:
    """The fraction of the copy's bandwidth; without that, run once and return 0."""
    op = TIMED["rms_norm"]
    make = maker(device, torch.bfloat16, width)
    inputs = op.inputs(make, rows, width)
    grad = make.normal(rows, width)
    call = torch.ops.ilm.rms_norm_backward

    def backward(t: Tensors) -> object:
        return call(grad, t["x"], t["weight"], EPS, False, 0.0)

    with mock.patch.object(triton_norm, "BACKWARD", (launch,)):
        if copy is None:
            backward(inputs)
            return 0.0
        times = measure(backward, device, before=lambda: inputs, smoke=rows == SMOKE_ROWS)
    return op.backward_bytes(inputs, [grad]) / times.median_s / copy


def _time(width: int, launch: Launch, device: torch.device, smoke: bool, copy: float) -> Choice:
    in_table = launch == launch_for(triton_norm.BACKWARD, width)
    try:
        fraction = _run(width, launch, device, SMOKE_ROWS if smoke else ROWS, copy)
        return Choice(width, launch, in_table, fraction)
    except Exception:
        return Choice(width, launch, in_table, 0.0, traceback.format_exc().splitlines()[-1])


def compile_once(task: tuple[int, Launch, torch.device, bool]) -> None:
    """Launch once."""
    width, launch, device, _ = task
    _run(width, launch, device, SMOKE_ROWS, None)


def _show(choices: list[Choice]) -> None:
    lines = []
    for width in sorted({choice.width for choice in choices}):
        at_width = [choice for choice in choices if choice.width == width]
        for place, choice in enumerate(at_width):
            if place < SHOWN or choice.in_table:
                launch = choice.launch
                columns = f"{launch.pieces} x {launch.block}"
                sizes = (width, columns, launch.warps, launch.stages, launch.programs_per_sm)
                mark = f"* {place + 1}." if choice.in_table else ""
                lines.append((*sizes, f"{choice.fraction:.1%}", mark))
    headings = ("hidden", "columns", "warps", "stages", "programs/SM", "of copy", "")
    show_table("backward of rms_norm (*: the table's choice)", headings, lines)

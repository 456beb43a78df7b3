"""Every fused op against float64, forward and backward, on new random numbers in each run.

New tensors are full of NaN while a fused op runs, so that an element it forgets is seen. The
reference is the op's own CPU implementation in float64; float64 runs it on CUDA too, where large
tensors stay. The error of a tensor is ||out - reference|| / ||reference||. It must be within the
bound of its dtype, and at most twice that of plain torch in the same dtype, or of a rounding.
"""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.failure import Deadline, Result, SectionError
from benchmarks.gpu.layouts import LAYOUTS
from benchmarks.gpu.ops import CHECKED, SOME
from benchmarks.gpu.ops.op import KernelOp, maker
from benchmarks.gpu.pool import run_all
from benchmarks.gpu.reference import BOUNDS, ROUNDING, exactly, poisoned, relative_error, run

FEW_ROWS = 7
LARGE = 2**24  # elements, so that a persistent program gets several rows at any width
SMOKE_ROWS = 40
TIME_S = 90.0
AGAIN_S = 35.0


@dataclass(frozen=True, slots=True)
class Task:
    """All cases of one op at one width, in one process."""

    op: str
    width: int
    device: torch.device
    seed: int
    smoke: bool


@dataclass(frozen=True, slots=True)
class Error:
    """Of one tensor of one case. plain: of plain torch. fault: what went wrong, if anything."""

    op: str
    dtype: str
    rows: int
    width: int
    layout: str
    tensor: str
    error: float
    plain: float
    fault: str | None


def kernel_correctness(device: torch.device, smoke: bool, result: Result) -> None:
    """The worst errors of each op and dtype; raises `SectionError` if any is above its bound."""
    seed = secrets.randbits(32)
    tasks = [
        Task(name, width, device, seed + width, smoke)
        for name, op in CHECKED.items()
        for width in (op.widths[:1] if smoke else sorted(op.widths, reverse=True))
    ]
    errors: list[Error] = []
    result |= {"seed": seed, "tasks": 0, "tasks_left_out": len(tasks)}
    for found in run_all(check, tasks, device, Deadline(TIME_S)):
        errors += found
        done = result["tasks"] + 1
        result |= {
            "tasks": done,
            "tasks_left_out": len(tasks) - done,
            "tensors": len(errors),
            "worst": summarize(errors),
            "faults": [e for e in errors if e.fault],
        }
    if result["tasks_left_out"] and not result.get("faults"):
        raise SectionError(f"{result['tasks_left_out']} of {len(tasks)} tasks in no time")
    _refuse(result["faults"])


def wrong_kernels(
    earlier: Mapping[str, Any], device: torch.device, smoke: bool, result: Result
) -> None:
    """Every case of the ops and widths that an earlier `kernel_correctness` found wrong, in full.

    earlier: its result, as JSON has it. On the same random numbers, in this process, so that what
    compiles and what it says is in this log. Raises `SectionError` if a fault is still there.
    """
    found: list[Error] = []
    result |= {"seed": earlier["seed"], "errors": found}
    deadline = Deadline(AGAIN_S)
    for name, width in sorted({(e["op"], e["width"]) for e in earlier["faults"]}):
        if not deadline.passed:
            found += check(Task(name, width, device, earlier["seed"] + width, smoke))
    _refuse([e for e in found if e.fault])


def _refuse(faults: Sequence[Error]) -> None:
    if faults:
        raise SectionError(f"{len(faults)} faults, the first: {faults[0]}")


def summarize(errors: Sequence[Error]) -> dict[str, dict[str, float]]:
    """By op and dtype: the largest error, and the largest of plain torch."""
    worst: dict[str, dict[str, float]] = {}
    for e in errors:
        entry = worst.setdefault(f"{e.op}, {e.dtype}", {"error": 0.0, "plain": 0.0})
        entry["error"] = max(entry["error"], e.error)
        entry["plain"] = max(entry["plain"], e.plain)
    return worst


def check(task: Task) -> list[Error]:
    """The errors of all cases of a task; an op that raises has one of infinity."""
    found: list[Error] = []
    for dtype in BOUNDS:
        for rows, layout in _cases(CHECKED[task.op], task.width, smoke=task.smoke):
            where = (task.op, str(dtype).removeprefix("torch."), rows, task.width, layout)
            try:
                found += [
                    Error(*where, tensor, error, plain, fault)
                    for tensor, error, plain, fault in check_case(
                        CHECKED[task.op], dtype, rows, task.width, layout, task.device, task.seed
                    )
                ]
            except Exception:
                found.append(Error(*where, "all", torch.inf, 0.0, traceback.format_exc()))
    return found


def _cases(op: KernelOp, width: int, *, smoke: bool) -> Iterator[tuple[int, str]]:
    """Numbers of rows with layouts. The large number is odd, and divides into nothing."""
    many = SMOKE_ROWS if smoke else min(LARGE // width + 3, op.max_rows)
    for layout in LAYOUTS:
        if layout == "contiguous":
            yield op.min_rows, layout
            yield many, layout
        elif layout == "expanded" and not op.has_expanded:
            continue
        elif layout != "misaligned" or width in SOME:
            yield FEW_ROWS, layout


def check_case(
    op: KernelOp,
    dtype: torch.dtype,
    rows: int,
    width: int,
    layout: str,
    device: torch.device,
    seed: int,
) -> Iterator[tuple[str, float, float, str | None]]:
    """For each output and gradient: name, error, error of plain torch, fault."""
    make = maker(device, dtype, seed)
    lay_out, lay_out_grad = LAYOUTS[layout]
    inputs = op.inputs(make, rows, width)
    for name in op.trained or ("logits",):
        if inputs[name].dim() > 1:
            inputs[name] = lay_out(inputs[name])
    with torch.no_grad():
        shapes = op.plain(inputs)
    grads = [lay_out_grad(make.normal(*out.shape, dtype=out.dtype)) for out in shapes]
    with poisoned(device):
        ours = run(op, op.fused, inputs, grads)
    plain = run(op, op.plain, inputs, grads)
    exact = run(op, op.fused, *exactly(inputs, grads))
    bound = BOUNDS[torch.float32 if op.in_float32 else dtype] * op.slack
    for name, reference in exact.items():
        error, of_plain = (relative_error(found[name], reference) for found in (ours, plain))
        allowed = max(2 * of_plain, ROUNDING[dtype])
        fault = None
        if not error <= bound:
            fault = f"above {bound:g}"
        elif not error <= allowed * op.slack:
            fault = f"above {allowed * op.slack:g}, for plain torch has {of_plain:.2g}"
        yield name, error, of_plain, fault

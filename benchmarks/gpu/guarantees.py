"""What must hold of every kernel beside its numbers: long tensors, no recompilation, no waiting."""

from __future__ import annotations

import secrets
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.failure import Deadline, Result, SectionError
from benchmarks.gpu.layouts import sliced
from benchmarks.gpu.ops import CHECKED, FAMILIES
from benchmarks.gpu.ops.attentions import SLACK
from benchmarks.gpu.ops.op import maker
from benchmarks.gpu.reference import BOUNDS, exactly, relative_error, run
from ilm_compile import kernels

DTYPE = torch.bfloat16
LONG = 2**31  # elements: their indices do not fit into int32
SMOKE_LONG = 2**14
LONG_WIDTH, SMOKE_WIDTH = 4096, 64
PART = 8  # rows that are compared, at either end
FIRST_ROWS = 64
OTHER_ROWS = (1, 7, 1000, 4096, 5000, 8192)  # 8192: two sequences
TIME_S = 34.0


def kernel_guarantees(device: torch.device, smoke: bool, result: Result) -> None:
    """What each check found of each op; raises `SectionError` if any found a fault."""
    seed = secrets.randbits(32)
    deadline = Deadline(TIME_S)
    faults: list[str] = []
    result |= {"seed": seed, "faults": faults}
    for name, (check, ops) in CHECKS.items():
        result[name] = {}
        for op in ops:
            if deadline.passed:
                faults.append(f"{name}, {op}: no time")
                continue
            try:
                found, fault = check(op, device, smoke, seed)
            except Exception:
                found, fault = None, traceback.format_exc()
            result[name][op] = found
            if fault:
                faults.append(f"{name}, {op}: {fault}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if faults:
        raise SectionError(f"{len(faults)} faults, the first: {faults[0]}")


def _without_waiting(
    name: str, device: torch.device, smoke: bool, seed: int
) -> tuple[str, str | None]:
    """Forward and backward never wait for the device; torch raises where one would."""
    op = CHECKED[name]
    inputs, grads, _ = op.random(maker(device, DTYPE, seed), FIRST_ROWS, _width(smoke))
    run(op, op.fused, inputs, grads)
    with no_waiting(device):
        run(op, op.fused, inputs, grads)
    return "does not wait", None


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """torch raises where the host waits for the device; nothing to wait for on the CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _compiled_once(
    name: str, device: torch.device, smoke: bool, seed: int
) -> tuple[dict[str, int], str | None]:
    """How many Triton kernels one number of rows compiles, and how many more the others do."""
    op = FAMILIES[name]
    with compilations() as compiled:
        for rows in (FIRST_ROWS, *(OTHER_ROWS[:3] if smoke else OTHER_ROWS)):
            count = min(max(rows, op.min_rows), op.max_rows)
            inputs, grads, _ = op.random(maker(device, DTYPE, seed), count, 64)
            run(op, op.fused, inputs, grads)
            if rows == FIRST_ROWS:
                first = len(compiled)
    more = compiled[first:]
    fault = f"{len(more)} compiled anew, the first: {more[0]}" if more else None
    return {"first": first, "more": len(more)}, fault


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The Triton kernels that are compiled inside, or loaded from the cache on disk, as they come.

    One that this process had compiled before does not count. Empty without triton.
    """
    found: list[str] = []
    try:
        from triton import knobs
    except ImportError:
        yield found
        return

    def note(*args: Any, **details: Any) -> None:
        found.append(str(details.get("repr", args)))

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before


def _long(
    name: str, device: torch.device, smoke: bool, seed: int
) -> tuple[dict[str, Any], str | None]:
    """The first and the last rows of tensors of more than 2^31 elements, against float64."""
    if name == "attention":
        return _long_attention(device, smoke, seed)
    op, width, limit = FAMILIES[name], _width(smoke), SMOKE_LONG if smoke else LONG
    sample = op.inputs(maker(torch.device("cpu"), DTYPE, seed), PART, width)
    rows = limit // (max(t.numel() for t in sample.values()) // PART) + PART
    inputs, grads, _ = op.random(maker(device, DTYPE, seed), rows, width)
    for tensor in op.trained:
        if inputs[tensor].dim() > 1:
            inputs[tensor] = sliced(inputs[tensor])
    for grad in grads:  # so that the last rows alone make the gradient of a weight
        grad.narrow(grad.shape.index(rows), 0, rows - PART).zero_()
    found = run(op, op.fused, inputs, grads)
    errors: dict[str, float] = {}
    for start in (0, rows - PART):
        end = [_rows(t, rows, start) for t in grads]
        part = {n: _rows(t, rows, start) for n, t in inputs.items()}
        exact = run(op, op.fused, *exactly(part, end))
        for tensor in op.outputs if start == 0 else exact:
            errors[f"{tensor}, row {start}"] = relative_error(
                _rows(found[tensor], rows, start), exact[tensor]
            )
    return _judge(errors, op.slack, max(t.numel() for t in inputs.values()))


def _long_attention(
    device: torch.device, smoke: bool, seed: int
) -> tuple[dict[str, Any], str | None]:
    """The last of many sequences, forward; against plain torch in float32."""
    op, seq = FAMILIES["attention"], 16 if smoke else 2048
    heads, dim = (4, 16) if smoke else (32, 128)
    batch = (SMOKE_LONG if smoke else LONG) // (seq * heads * dim) + 1
    make = maker(device, DTYPE, seed)
    t = {"q": make.normal(batch, seq, heads, dim)}
    t |= {name: make.normal(batch, seq, heads // 4, dim) for name in ("k", "v")}
    found = kernels.attention(t["q"], t["k"], t["v"])
    (exact,) = op.plain({name: tensor[-1:].float() for name, tensor in t.items()})
    error = relative_error(found[-1:], exact)
    return _judge({"y, last sequence": error}, SLACK, t["q"].numel())


def _judge(
    errors: dict[str, float], slack: float, elements: int
) -> tuple[dict[str, Any], str | None]:
    wrong = {name: error for name, error in errors.items() if not error <= BOUNDS[DTYPE] * slack}
    return {"elements": elements, "errors": errors}, f"errors {wrong}" if wrong else None


def _rows(x: Tensor, rows: int, start: int) -> Tensor:
    """`PART` rows of what has `rows` in some dim; anything else as it is."""
    return x.narrow(x.shape.index(rows), start, PART) if rows in x.shape else x


def _width(smoke: bool) -> int:
    return SMOKE_WIDTH if smoke else LONG_WIDTH


CHECKS: dict[str, tuple[Callable[..., tuple[Any, str | None]], tuple[str, ...]]] = {
    "does not wait": (_without_waiting, tuple(CHECKED)),
    "compiled once": (_compiled_once, tuple(FAMILIES)),
    "more than 2^31 elements": (_long, tuple(FAMILIES)),
}

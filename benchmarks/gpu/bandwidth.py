"""GB/s of the fused ops, forward and backward, beside who else computes them, in bf16.

The bytes are what an op cannot avoid moving (`KernelOp`), the same for all, and the fraction is of
what a large copy moves on this card in the same run; beside it, of what a copy of just these bytes
moves. Backwards go through autograd, for all. Kernels that were found wrong are not timed.

Goals: 90 % of the copy forward and 85 % backward from 8192 rows on, and never slower than the best
peer. A row that misses one says so; the section does not fail.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.failure import Deadline, Result
from benchmarks.gpu.ops import TIMED
from benchmarks.gpu.ops.op import Function, Tensors, maker
from benchmarks.gpu.peers import COMPILED, OURS, load_peers
from benchmarks.gpu.pool import compile_ahead, forget_compiled
from benchmarks.gpu.reference import relative_error, run
from benchmarks.gpu.timing import Times, copy_bandwidth, measure, product_flops

DTYPE = torch.bfloat16
WIDTHS = (2048, 4096, 5120, 6144, 8192)
ROWS = ((8192, 32768), (16384, 4096, 65536))  # first of every op and width the first two
SMOKE_WIDTHS, SMOKE_ROWS = (64,), ((16,), (32,))
GOALS = {"forward": 0.90, "backward": 0.85}
GOAL_ROWS = 8192
NOISE = 0.01  # a peer that is faster by less is not
AGREEMENT = 2e-2  # relative error within which a peer computes the same
# Intermediate sizes of InternLM2-1.8B, 7B, InternLM-20B, InternLM2-20B and Llama-3-70B.
INTERMEDIATE = {2048: 8192, 4096: 14336, 5120: 13824, 6144: 16384, 8192: 28672}
TIME_S = 138.0
PREPARE_S = 35.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One contestant in one row. fraction: of the large copy's bandwidth; of_own_copy: of that of a
    copy of as many bytes."""

    gb_per_s: float
    fraction: float
    of_own_copy: float
    times: Times


@dataclass(frozen=True, slots=True)
class Row:
    """An op at one size in one direction. width: hidden, or intermediate size for swiglu.

    best_peer: None without one. ratio: its time by ours, above 1 where we are faster. goals: "ok"
    or "missed", or "-" where there is none.
    """

    op: str
    direction: str
    hidden: int
    width: int
    rows: int
    bytes: int
    entries: dict[str, Entry]
    best_peer: str | None = None
    ratio: float | None = None
    goals: dict[str, str] = field(default_factory=dict)


def bandwidth(
    device: torch.device, smoke: bool, result: Result, wrong: Collection[str] = ()
) -> None:
    """Every row that time allows, the ceilings of the card, who was left out and why.

    wrong: ops that an earlier check found wrong.
    """
    deadline = Deadline(TIME_S)
    tasks = [(op, hidden, device) for op in TIMED for hidden in WIDTHS]
    compile_ahead(compile_once, tasks, device, PREPARE_S)
    copy = copy_bandwidth(device, smoke=smoke)
    rows: list[Row] = []
    missed: list[str] = []
    left_out: dict[str, dict[str, str]] = {op: {} for op in TIMED}
    untimed: list[str] = [f"{op}: it computes wrong numbers" for op in TIMED if op in wrong]
    result |= {
        "copy_gb_per_s": copy * 1e-9,
        "product_flops": product_flops(device, smoke=smoke),
        "dtype": "bfloat16",
        "goals": {"fraction": GOALS, "from_rows": GOAL_ROWS, "noise": NOISE},
        "missed": missed,
        "peers_left_out": left_out,
        "untimed": untimed,
        "rows": rows,
    }
    groups, widths = (SMOKE_ROWS, SMOKE_WIDTHS) if smoke else (ROWS, WIDTHS)
    ops = [op for op in TIMED if op not in wrong]
    for counts, op, hidden in product(groups, ops, widths):
        if deadline.passed:
            untimed += [f"{op}, hidden {hidden}, {count} rows" for count in counts]
            continue
        forget_compiled(device)
        peers, absent = load_peers(op, device)
        left_out[op] |= absent
        contestants = {OURS: TIMED[op].fused, **peers}
        for count in counts:
            is_first = count == counts[0]
            found = list(
                _measure(
                    op, hidden, count, contestants, left_out[op], device, copy, is_first, smoke
                )
            )
            rows += found
            missed += [_name(row) for row in found if "missed" in row.goals.values()]


def judge(row: Row) -> Row:
    """The row with its best peer and its goals."""
    ours = row.entries[OURS]
    peers = {n: e.times.median_s for n, e in row.entries.items() if n != OURS}
    enough = ours.fraction >= GOALS[row.direction]
    goals = {"bandwidth": "-" if row.rows < GOAL_ROWS else "ok" if enough else "missed"}
    if not peers:
        return replace(row, goals=goals | {"fastest": "-"})
    best = min(peers, key=peers.__getitem__)
    ratio = peers[best] / ours.times.median_s
    goals["fastest"] = "ok" if ratio >= 1 - NOISE else "missed"
    return replace(row, best_peer=best, ratio=ratio, goals=goals)


def _name(row: Row) -> str:
    missed = [goal for goal, outcome in row.goals.items() if outcome == "missed"]
    return f"{row.op} {row.direction}, hidden {row.hidden}, {row.rows} rows: {', '.join(missed)}"


def _width(op: str, hidden: int) -> int:
    return INTERMEDIATE.get(hidden, hidden) if op == "swiglu" else hidden


def _measure(
    op: str,
    hidden: int,
    count: int,
    contestants: dict[str, Function],
    left_out: dict[str, str],
    device: torch.device,
    copy: float,
    is_first: bool,
    smoke: bool,
) -> Iterator[Row]:
    """Both directions. A peer that raises or computes something else is left out from here on.

    is_first: of its width; what peers compute is looked at then.
    """
    make, width = maker(device, DTYPE, count), _width(op, hidden)
    inputs, grads, outputs = TIMED[op].random(make, count, width)
    num_bytes = {
        "forward": TIMED[op].forward_bytes(inputs, outputs),
        "backward": TIMED[op].backward_bytes(inputs, outputs),
    }
    del outputs
    own = {direction: copy_bandwidth(device, n, smoke=smoke) for direction, n in num_bytes.items()}
    entries: dict[str, dict[str, Entry]] = {direction: {} for direction in num_bytes}
    for name, call in contestants.items():
        if name in left_out:
            continue
        try:
            if is_first and name != OURS:
                _check_same(op, call, inputs, grads)
            for direction, before, timed in _calls(op, call, inputs, grads):
                times = measure(timed, device, before=before, smoke=smoke)
                speed = num_bytes[direction] / times.median_s
                fractions = speed / copy, speed / own[direction]
                entries[direction][name] = Entry(speed * 1e-9, *fractions, times)
        except Exception as error:
            if name == OURS:
                raise
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            for found in entries.values():
                found.pop(name, None)
    for direction, found in entries.items():
        yield judge(Row(op, direction, hidden, width, count, num_bytes[direction], found))


def _calls(
    op: str, call: Function, inputs: Tensors, grads: Sequence[Tensor]
) -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], object]]]:
    """By direction: what is run before, and what is timed. Each backward has a graph of its own."""
    leaves = {n: t.detach().requires_grad_(n in TIMED[op].trained) for n, t in inputs.items()}
    wanted = [leaves[name] for name in TIMED[op].trained]
    own = [grad.clone() for grad in grads]  # some write into them
    yield "forward", lambda: leaves, call
    yield (
        "backward",
        lambda: call(leaves),
        lambda outputs: torch.autograd.grad(outputs, wanted, own),
    )


def _check_same(op: str, call: Function, inputs: Tensors, grads: Sequence[Tensor]) -> None:
    """Raise ValueError unless a peer's outputs and gradients are ours, within bf16's rounding."""
    expected = run(TIMED[op], TIMED[op].fused, inputs, grads)
    copies = {n: t.clone() for n, t in inputs.items()}  # some work in place
    found = run(TIMED[op], call, copies, [g.clone() for g in grads])
    errors = {n: relative_error(found[n], tensor) for n, tensor in expected.items()}
    if not max(errors.values()) <= AGREEMENT:
        raise ValueError(f"computes something else: relative errors {errors}")


def compile_once(task: tuple[str, int, torch.device]) -> None:
    """Run torch.compile's version and ours at the first two numbers of rows.

    The second has torch compile for any number.
    """
    op, hidden, device = task
    forget_compiled(device)
    compiled = load_peers(op, device)[0][COMPILED]
    for count in ROWS[0]:
        make = maker(device, DTYPE, count)
        inputs, grads, _ = TIMED[op].random(make, count, _width(op, hidden))
        for function in (TIMED[op].fused, compiled):
            run(TIMED[op], function, inputs, grads)

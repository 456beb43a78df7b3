"""Translation validation: a pass's output against its input, run on random weights and data.

Imported for its effect: it gives `run_passes` and `partition` their ``validate="numerics"``. The
program is run at the size it has, one micro-batch forward and backward on every tp rank; what is
too big for this machine is for `ilm_compile.verify`, which shrinks it.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ilm_compile.errors import PlanError, ProgramError
from ilm_compile.passes import Pass, check_program
from ilm_compile.passes.manager import VALIDATORS
from ilm_compile.program.copy import copy_program
from ilm_compile.program.program import Program
from ilm_compile.program.values import tensors_of
from ilm_compile.program.vocab import vocab_embedding
from ilm_compile.verify.bisect import first_difference, loss_of, ranks_of
from ilm_compile.verify.exact import exact
from ilm_compile.verify.reference import complete_inputs, random_batch

LOOKUPS = (torch.ops.aten.embedding.default, vocab_embedding)
# Bit for bit is asked of the values; gradients of a value used twice may be added in another order.
ROUNDING = 1e-12
BYTES, COPIES = 8, 2  # of a float64; a value and its gradient


@contextmanager
def validate_numerics(step: Pass, program: Program) -> Iterator[None]:
    """Check the types of what `step` makes, and its numbers against those of its input.

    A pass that preserves numerics is held to its tolerance at every node, value and gradient, in
    float64; one that changes them at the loss, in the program's own dtypes. Raises `PlanError` if
    the program is too big to be run here, `ProgramError` at a difference.
    """
    _refuse_size(program)
    before = copy_program(program)
    yield
    check_program(program)
    _refuse_size(program)
    if step.numerics == "changing":
        _compare_loss(step, before, program)
        return
    old, new = exact(before), exact(program)
    tolerance = max(step.tolerance, ROUNDING)
    found = first_difference(old, new, random_tensors(old), random_inputs(old), tolerance=tolerance)
    if found is not None:
        raise ProgramError(
            f"it must preserve numerics to {tolerance:g}, but its output computes something else "
            f"than its input: {found}"
        )


VALIDATORS["numerics"] = validate_numerics


def _compare_loss(step: Pass, before: Program, after: Program) -> None:
    tensors, inputs = random_tensors(before), random_inputs(before)
    old, new = (loss_of(program, tensors, inputs) for program in (before, after))
    error = abs(new - old) / abs(old) if old else abs(new)
    if not error <= step.tolerance:
        raise ProgramError(
            f"it may move the loss by {step.tolerance:g} of it, but moved it by {error:.1e}, from "
            f"{old:.6g} to {new:.6g}"
        )


def random_tensors(program: Program) -> dict[str, Tensor]:
    """Return a value for every parameter and buffer, by name, that its name and shape determine.

    Matrices keep the scale of what they multiply, vectors lie about 1.
    """
    tensors = {}
    for name, variable in program.variables.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = variable.user_shape
        if not variable.dtype.is_floating_point:
            tensors[name] = torch.ones(shape, dtype=variable.dtype)
            continue
        value = torch.randn(shape, generator=generator, dtype=variable.dtype)
        is_matrix = len(shape) > 1
        tensors[name] = value / math.sqrt(shape[-1]) if is_matrix else 1 + 0.1 * value
    return tensors


def random_inputs(program: Program) -> dict[str, Tensor]:
    """Return one micro-batch of random data, by placeholder; counts of targets and seeds are 1."""
    tables = [str(n.args[0].target) for n in program.calls() if n.target in LOOKUPS]  # type: ignore[union-attr]
    sizes = [program.variables[t].user_shape[0] for t in tables if t in program.variables]
    return complete_inputs(program, random_batch(program.inputs, 1, min(sizes, default=2)))


def _refuse_size(program: Program) -> None:
    values = (value for node in program.graph.nodes for value in tensors_of(node.meta.get("val")))
    held = sum(value.numel() for value in values)
    needed = held * ranks_of(program) * BYTES * COPIES
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS does not tell
        return
    if needed > free:
        raise PlanError(
            f'validate="numerics" runs the program as it is: about {needed / 1e9:,.0f} GB, and '
            f'{free / 1e9:,.0f} GB are free; use validate="types", and ilm_compile.verify, which '
            "runs a small model of the same structure"
        )

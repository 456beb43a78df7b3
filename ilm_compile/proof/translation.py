"""Translation validation: a pass's output against its input, run on random weights and data.

Imported for its effect: it gives `run_passes` and `partition` their ``validate="numerics"``. The
programs are run piece by piece, one micro-batch forward and backward on every tp rank, at the size
they have, or with sizes made smaller in both where that is too large.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ilm_compile.errors import ProgramError
from ilm_compile.passes import Pass, check_program
from ilm_compile.passes.manager import VALIDATORS
from ilm_compile.program.copy import copy_program
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program
from ilm_compile.proof.dtypes import check_dtypes
from ilm_compile.proof.inputs import corner_batch, microbatch
from ilm_compile.proof.numbers import Side, gather, relative_error, run, sizes_of
from ilm_compile.proof.precision import check_precision
from ilm_compile.proof.static import check_variables
from ilm_compile.proof.subject import Subject
from ilm_compile.proof.weights import tensors_for

# Bit for bit is asked of the values; gradients of a value used twice may be added in another order.
ROUNDING = 1e-12


@contextmanager
def validate_numerics(step: Pass, program: Program) -> Iterator[None]:
    """Check the types of what `step` makes, and its numbers against those of its input.

    A pass that preserves numerics is held to its tolerance in every region, outputs and gradients,
    in float64; one that changes them at the outputs, in the program's own dtypes, and to the error
    budget of its casts. Neither may change which weights are trained. Raises `PlanError` if the
    program is too big to be run here, `ProgramError` at a difference.
    """
    before = copy_program(program)
    yield
    check_program(program)
    check_variables(before, program)
    subject = Subject(before, program, None)
    if step.numerics == "changing":
        _compare_outputs(step, subject)
        is_cast = program.plan.dtype is not None and "cast" in program.facts - before.facts
        if is_cast and set(sizes_of(before).values()) == {
            1
        }:  # `verify` has the unsharded graph to go by
            check_precision(subject)
        return
    check_dtypes(before, program)
    tolerance = max(step.tolerance, ROUNDING)
    _, compared = subject.regions()
    for piece, found, locate in compared:
        if found.is_finite and not found.largest <= tolerance:
            raise ProgramError(
                f"it must preserve numerics to {tolerance:g}, but its output computes something "
                f"else than its input in {piece.region}: {found.worst()}; {locate(tolerance)}"
            )


VALIDATORS["numerics"] = validate_numerics


def _compare_outputs(step: Pass, subject: Subject) -> None:
    """Compare the loss and the other outputs of one micro-batch."""
    fit = subject.fit_whole()
    old, new = (_outputs(program, subject) for program in (fit.traced, fit.program))
    for name, value in old.items():
        error = relative_error(new[name].double(), value.double())
        if not error <= step.tolerance:
            raise ProgramError(
                f"it may move {name} by {step.tolerance:g} of it, but moved it by {error:.1e}"
                + (
                    f", from {float(value):.6g} to {float(new[name]):.6g}"
                    if not value.dim()
                    else ""
                )
            )


def _outputs(program: Program, subject: Subject) -> dict[str, Tensor]:
    side = Side.of(program)
    tensors = tensors_for(program, subject.buffers)
    inputs = microbatch(program, corner_batch(program, 1))
    found = run(side, tensors, inputs, [None] * len(program.outputs), in_own_dtypes=True)
    nodes = zip(program.output_names, program.outputs, found.outputs, strict=True)
    return {
        name: gather(parts, layout_of(node), side.sizes, "value")[0] for name, node, parts in nodes
    }

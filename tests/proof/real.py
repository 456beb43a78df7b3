"""The same step in real processes and emulated in one of them, for tests to compare."""

from __future__ import annotations

import ilm_compile
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.proof.emulate import emulate
from ilm_compile.proof.promote import promoted_float32
from tests.proof.small import INPUTS, compile_model, make_batch, make_model
from tests.support.equality import Case, Errors, compare


def compare_with_emulation(rank: int, cases: list[Case]) -> list[tuple[str, Errors | None]]:
    """Return the errors of the emulation against this world's processes, None but on rank 0."""
    return [(str(case), _compare(case)) for case in cases]


def _compare(case: Case) -> Errors | None:
    model = make_model(case.model)
    with promoted_float32():
        parallel = ilm_compile.parallelize(model, example_inputs=INPUTS, **case.plan)
    program = compile_model(model, **case.plan)
    batch = make_batch(program, case.dp)
    loss = parallel.execute_schedule(batch)
    gradients = parallel.full_gradients()
    if not gradients:
        return None
    [step] = emulate(lower(program), make_schedule(program.plan), model, [batch], dp=case.dp)
    return compare(step.loss, loss, step.gradients, gradients)

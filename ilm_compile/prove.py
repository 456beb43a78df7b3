"""`verify`: proof, in one process and before launch, that a plan trains the same model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ilm_compile.compile import make_plan, partition
from ilm_compile.errors import IlmCompileError
from ilm_compile.passes import Pass, lower
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import ExampleInputs, LossFn
from ilm_compile.verify.blocks import uncovered
from ilm_compile.verify.compare import Comparison, compare
from ilm_compile.verify.report import Check, Report
from ilm_compile.verify.subject import Subject
from ilm_compile.verify.values import check_values


def verify(
    model: nn.Module,
    *,
    dp: int = 1,
    example_inputs: ExampleInputs | None = None,
    loss_fn: LossFn | None = None,
    passes: Sequence[Pass] = (),
    plan: Plan | None = None,
    tolerance: float = 1e-10,
    **keywords: Any,
) -> Report:
    """Return whether `model` under the plan trains exactly as it does on a single device.

    Keywords as for `partition`; `dp` is the number of data-parallel ranks. Four layers:

    1. types: the full-size program is partitioned, every placement checked after every pass, every
       shape and dtype computed anew, and the schedule proven complete and free of cyclic waits;
    2. step: a small model of the same structure (see `ilm_compile.verify.shrink`) takes one
       training step under the plan, all ranks emulated in this process, and loss, every gradient
       and the weights after one AdamW step are compared in float64 with the plain model's. Casts
       to bf16 stay in the program and round nothing; dropout is off;
    3. blocks: every block of the full-size program is, but for its sizes, one that took the step;
    4. bisect: on a difference, the first pass that makes one, and its first node.

    No process group, GPU or weight of the full model is needed. Never raises for a plan that fails:
    see `Report.failures` and `Report.raise_if_failed`.
    """
    words = "".join(f"{name}={value}, " for name, value in keywords.items())
    proof = _Proof(f"verify {type(model).__name__}: {words}dp={dp}")
    with proof.check("types") as note:
        program = partition(
            model,
            example_inputs=example_inputs,
            loss_fn=loss_fn,
            passes=passes,
            plan=make_plan(plan, **keywords),
        )
        check_values(program)
        lower(program)
        note(f"{len(list(program.calls()))} nodes, {len(program.pass_log)} passes, the schedule")
    if not proof.failures:
        with proof.check("shrink") as note:
            subject = Subject(model, program, loss_fn=loss_fn, passes=passes, dp=dp)
            size = sum(parameter.numel() for parameter in subject.model.parameters())
            note(f"{size:,} parameters of the same structure")
    if not proof.failures:
        _step(proof, program, subject, tolerance)
    return proof.report()


@dataclass
class _Proof:
    """A report under construction."""

    title: str
    checks: list[Check] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def report(self) -> Report:
        return Report(self.title, self.checks, self.failures, **self.errors)

    @contextmanager
    def check(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a layer and turn what it raises into a failure."""
        start = time.perf_counter()
        notes: list[str] = []
        failed = ""
        try:
            yield notes.append
        except IlmCompileError as error:
            failed = f"{name}: {error}"
        except Exception as error:  # a program may break in any way; its report goes on
            failed = f"{name}: {type(error).__name__}: {error}"
        detail = failed.splitlines()[0][:120] if failed else "; ".join(notes)
        self.checks.append(Check(name, not failed, detail, time.perf_counter() - start))
        self.failures += [failed] if failed else []


def _step(proof: _Proof, program: Program, subject: Subject, tolerance: float) -> None:
    """Take one step of a small model both ways and compare; on a difference, find its origin."""
    with proof.check("step") as note:
        small = subject.compile(subject.plan)
        step, lowered = subject.step(small, subject.batch)
        found = compare(step, subject.expected(subject.batch))
        proof.errors = {
            "max_loss_error": found.loss,
            "max_grad_error": found.max_gradient,
            "max_weight_error": found.max_weight,
        }
        worst = ", ".join(f"{n[4:-6]} {e:.0e}" for n, e in proof.errors.items())
        plan = subject.plan
        note(f"{plan.tp * plan.pp * subject.dp} ranks emulated; largest errors: {worst}")
        if wrong := found.describe(tolerance):
            raise IlmCompileError(
                f"not equal to the single-device model: {wrong}{_tied(lowered, found, tolerance)}"
            )
    if proof.failures:
        with proof.check("bisect") as note:
            note(_origin(subject, tolerance))
        if proof.checks[-1].ok:
            proof.failures.append(f"bisect: {proof.checks[-1].detail}")
        return
    with proof.check("blocks") as note:
        if missing := uncovered(program, small):
            raise IlmCompileError(
                f"{', '.join(missing)} of the full-size program are placed or wired unlike "
                "everything that took the step, so the step says nothing about them; leave less to "
                "the cost (sequence_parallel, constraints), or verify a small model of your own"
            )
        note(f"all {len(program.regions)} regions of the full-size program took the step")


def _tied(lowered: LoweredProgram, found: Comparison, tolerance: float) -> str:
    """Return a hint if parameters that several stages hold have wrong gradients."""
    return "".join(
        f"; {name} is held by stages {', '.join(map(str, owners))}, whose gradients must be summed"
        for name in found.wrong_gradients(tolerance)
        if len(owners := lowered.owners(name)) > 1
    )


def _origin(subject: Subject, tolerance: float) -> str:
    """Return the pass and node that first differ, or what the difference depends on."""
    found = subject.bisect(tolerance)
    if found is not None:
        return f"after pass {found[0]}, {found[1]}"
    return (
        "every node of the partitioned graph is right on one micro-batch, so the difference arises "
        f"in lowering, schedule or runtime: {subject.narrow(tolerance)}"
    )

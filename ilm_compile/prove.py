"""`verify`: proof, in one process and before launch, that a plan trains the same model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ilm_compile.compile import make_plan, partition
from ilm_compile.errors import IlmCompileError
from ilm_compile.passes import Pass, lower
from ilm_compile.program.dropout import SEED
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import ExampleInputs, LossFn
from ilm_compile.verify import translation as _translation  # noqa: F401 - validate="numerics"
from ilm_compile.verify.blocks import check_blocks, placed_otherwise
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
       to bf16 stay in the program and round nothing. A model with dropout takes two steps: one
       without, and one with it, compared with the same program on one rank;
    3. blocks: every block of the full-size program makes the calls of one that took the step; where
       its placements are other ones, which the types vouch for, that is a warning;
    4. bisect: on a difference, the first pass that makes one, and its first node.

    No process group, GPU or weight of the full model is needed. Never raises for a plan that fails:
    see `Report.failures` and `Report.raise_if_failed`.
    """
    proof = _Proof(_title(model, plan, keywords, dp))
    with proof.check("types") as note:
        program = partition(
            model,
            example_inputs=example_inputs,
            loss_fn=loss_fn,
            passes=passes,
            plan=make_plan(plan, **keywords),
            dp=dp,
        )
        check_values(program)
        lower(program)
        note(f"{len(list(program.calls()))} nodes, {len(program.pass_log)} passes, the schedule")
    if proof.failures:
        return proof.report()
    is_random = any(n.target == SEED for n in program.graph.find_nodes(op="placeholder"))
    for dropout in (False, True) if is_random else (False,):
        with proof.check("shrink") as note:
            subject = Subject(
                model, program, loss_fn=loss_fn, passes=passes, dp=dp, is_random=dropout
            )
            size = sum(parameter.numel() for parameter in subject.model.parameters())
            note(f"{size:,} parameters of the same structure")
        if not proof.failures:
            _step(proof, subject, tolerance)
        if proof.failures:
            return proof.report()
    with proof.check("blocks") as note:
        note(_blocks(proof, program, subject))
    return proof.report()


def _title(model: nn.Module, plan: Plan | None, keywords: Mapping[str, Any], dp: int) -> str:
    """Return the model's class and what of the plan is not the default."""
    plain = Plan()
    fields = Plan.__dataclass_fields__ if plan is not None else ()
    given = {n: getattr(plan, n) for n in fields if getattr(plan, n) != getattr(plain, n)}
    words = [f"{name}={value}" for name, value in {**given, **keywords, "dp": dp}.items()]
    return f"verify {type(model).__name__}: {', '.join(words)}"


@dataclass
class _Proof:
    """A report under construction."""

    title: str
    checks: list[Check] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def report(self) -> Report:
        return Report(self.title, self.checks, self.failures, self.warnings, **self.errors)

    def note_errors(self, found: Comparison) -> None:
        """Keep the largest errors of all steps."""
        for name, error in (
            ("max_loss_error", found.loss),
            ("max_grad_error", found.max_gradient),
            ("max_weight_error", found.max_weight),
        ):
            self.errors[name] = max(error, self.errors.get(name, 0.0))

    @contextmanager
    def check(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a layer and turn what it raises into a failure."""
        start = time.perf_counter()
        notes: list[str] = []
        failed = ""
        try:
            yield notes.append
        except IlmCompileError as error:
            failed = str(error)
        except Exception as error:  # a program may break in any way; its report goes on
            failed = f"{type(error).__name__}: {error}"
        detail = failed.splitlines()[0][:120] if failed else "; ".join(notes)
        self.checks.append(Check(name, not failed, detail, time.perf_counter() - start))
        self.failures += [f"{name}: {failed}"] if failed else []


def _step(proof: _Proof, subject: Subject, tolerance: float) -> None:
    """Take one step of a small model both ways and compare; on a difference, find its origin."""
    with proof.check("dropout" if subject.is_random else "step") as note:
        step, lowered = subject.step(subject.compile(subject.plan), subject.batch)
        found = compare(step, subject.expected(subject.batch))
        proof.note_errors(found)
        ranks = subject.plan.tp * subject.plan.pp * subject.dp
        note(f"{ranks} ranks emulated; largest errors: {found.summary()}")
        if wrong := found.describe(tolerance):
            reference = "same program on one rank" if subject.is_random else "single-device model"
            raise IlmCompileError(
                f"not equal to the {reference}: {wrong}{_tied(lowered, found, tolerance)}"
            )
    if proof.failures:
        with proof.check("bisect") as note:
            note(_origin(subject, tolerance))
        if proof.checks[-1].ok:
            proof.failures.append(f"bisect: {proof.checks[-1].detail}")


def _blocks(proof: _Proof, program: Program, subject: Subject) -> str:
    """Check that the step speaks for the full-size program, and return how far it does."""
    small = subject.compile(subject.plan)
    check_blocks(program, small)
    if otherwise := placed_otherwise(program, small):
        proof.warnings.append(
            f"blocks: the step took other placements than the full-size program has in "
            f"{', '.join(otherwise)}, where the search sees other costs; there the types alone "
            "vouch for the collectives"
        )
    total = len(program.regions)
    return f"{total} regions are like those stepped, {total - len(otherwise)} in placements too"


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

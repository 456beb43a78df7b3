"""`verify`: proof, in one process and before launch, that a plan trains the same model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ilm_compile.compile import make_plan, make_schedule, partition
from ilm_compile.errors import IlmCompileError
from ilm_compile.passes import Pass, lower, order_passes, run_passes, standard_passes
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Input
from ilm_compile.program.trace import ExampleInputs, LossFn, trace
from ilm_compile.verify.bisect import first_difference
from ilm_compile.verify.emulate import Step, emulate
from ilm_compile.verify.promote import promoted_float32
from ilm_compile.verify.reference import random_batch, single_device_step, small_inputs
from ilm_compile.verify.report import Check, Report
from ilm_compile.verify.shrink import shrink

GRADIENT_FLOOR = 1e-5  # of the global norm: some gradients are zero in theory
# AdamW's first step divides by the gradient: it magnifies the rounding of a tiny one.
WEIGHT_SLACK = 100


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

    Keywords as for `partition`; `dp` is the number of data-parallel ranks. Three layers:

    1. types: the full-size program is partitioned, every placement checked after every pass, and
       the schedule proven complete and free of cyclic waits;
    2. step: a small model of the same structure (see `ilm_compile.verify.shrink`) takes one
       training step under the plan, all ranks emulated in this process, and loss, every gradient
       and the weights after one AdamW step are compared in float64 with the plain model's;
    3. bisect: on a difference, the first pass that makes one, and its first node.

    The bf16 casts of ``dtype`` are left out of the step, which is about equality; their placements
    are checked with the rest. No process group, GPU or weight of the full model is needed. Never
    raises for a plan that fails: see `Report.failures` and `Report.raise_if_failed`.
    """
    title = f"verify {type(model).__name__}: {_words(keywords)}dp={dp}"
    proof = _Proof(title)
    with proof.check("types") as note:
        chosen = make_plan(plan, **keywords)
        program = partition(
            model, example_inputs=example_inputs, loss_fn=loss_fn, passes=passes, plan=chosen
        )
        lower(program)
        note(f"{len(list(program.calls()))} nodes, {len(program.pass_log)} passes, the schedule")
    if not proof.failures:
        exact = chosen.replace(dtype=None)
        subject = _Subject(model, program.inputs, loss_fn, exact, tuple(passes), dp)
        _step(proof, subject, tolerance)
    return proof.report()


def _words(keywords: Mapping[str, Any]) -> str:
    return "".join(f"{name}={value}, " for name, value in keywords.items())


@dataclass(frozen=True)
class _Subject:
    """What is verified: a model under a plan."""

    model: nn.Module
    inputs: dict[str, Input]
    loss_fn: LossFn | None
    plan: Plan
    passes: tuple[Pass, ...]
    dp: int


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
        detail = failed.splitlines()[0][:120] if failed else "; ".join(notes)
        self.checks.append(Check(name, not failed, detail, time.perf_counter() - start))
        self.failures += [failed] if failed else []


def _step(proof: _Proof, subject: _Subject, tolerance: float) -> None:
    """Take one step of a small model both ways and compare; on a difference, find its origin."""
    plan = subject.plan
    with promoted_float32():
        with proof.check("shrink") as note:
            model = shrink(subject.model, tp=plan.tp, num_stages=plan.num_stages)
            inputs = small_inputs(subject.inputs, plan.tp)
            batch = random_batch(inputs, plan.num_microbatches * subject.dp, _vocabulary(model))
            note(f"{sum(p.numel() for p in model.parameters()):,} parameters of the same structure")
        if proof.failures:
            return
        with proof.check("step") as note:
            program = partition(
                model,
                example_inputs={n: (i.shape, i.dtype) for n, i in inputs.items()},
                loss_fn=subject.loss_fn,
                passes=subject.passes,
                plan=plan,
            )
            schedule = make_schedule(plan)
            step = emulate(lower(program), schedule, model, batch, dp=subject.dp)
            expected = single_device_step(model, batch, subject.loss_fn)
            proof.errors, wrong = _compare(step, expected, tolerance)
            worst = ", ".join(f"{n[4:-6]} {e:.0e}" for n, e in proof.errors.items())
            note(f"{plan.tp * plan.pp * subject.dp} ranks emulated; largest errors: {worst}")
            if wrong:
                raise IlmCompileError(f"not equal to the single-device model: {wrong}")
        if proof.failures:
            with proof.check("bisect") as note:
                note(_bisect(subject, model, inputs, batch, tolerance))
            proof.failures.append(f"bisect: {proof.checks[-1].detail}")


def _vocabulary(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    return int(getattr(config, "vocab_size", 2))


def _compare(step: Step, expected: Step, tolerance: float) -> tuple[dict[str, float], str]:
    """Return the largest errors, and what is out of bounds in words."""
    norm = torch.stack([g.norm() for g in expected.gradients.values()]).norm()
    loss = {"loss": float((step.loss - expected.loss).abs() / expected.loss.abs())}
    gradients = _errors(step.gradients, expected.gradients, GRADIENT_FLOOR * float(norm))
    weights = _errors(step.weights, expected.weights, 1e-12)
    largest = {
        f"max_{kind}_error": max(errors.values(), default=0.0)
        for kind, errors in (("loss", loss), ("grad", gradients), ("weight", weights))
    }
    bounds = (("", loss, 1), ("gradient of ", gradients, 1), ("weight ", weights, WEIGHT_SLACK))
    wrong = [
        f"{kind}{name} by {error:.1e}"
        for kind, errors, slack in bounds
        for name, error in errors.items()
        if not error <= slack * tolerance
    ]
    more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
    return largest, ", ".join(wrong[:4]) + more


def _errors(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float
) -> dict[str, float]:
    missing = {name: float("inf") for name in expected if name not in actual}
    return missing | {
        name: float((actual[name] - value).norm()) / max(float(value.norm()), floor)
        for name, value in expected.items()
        if name in actual
    }


def _bisect(
    subject: _Subject,
    model: nn.Module,
    inputs: dict[str, Input],
    batch: Mapping[str, Tensor],
    tolerance: float,
) -> str:
    """Return the first pass after which the program differs, and its first node."""
    example = {n: (i.shape, i.dtype) for n, i in inputs.items()}
    traced = trace(model, example_inputs=example, loss_fn=subject.loss_fn, plan=subject.plan)
    program = trace(model, example_inputs=example, loss_fn=subject.loss_fn, plan=subject.plan)
    values = {name: batch[name][: i.shape[0]] for name, i in inputs.items()}
    values.update({name: torch.ones((), dtype=torch.float64) for name in program.target_counts})
    for step in order_passes([*standard_passes(subject.plan), *subject.passes], program.facts):
        run_passes(program, [step])
        found = first_difference(traced, program, model, values, tolerance=tolerance)
        if found is not None:
            return f"after pass {step.name}, {found}"
    return (
        "every node of the partitioned graph is right on one micro-batch: the difference arises in "
        "lowering, schedule or runtime"
    )

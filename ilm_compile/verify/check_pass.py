"""`check_pass`: tries a pass on a zoo of small models and plans: does it keep its word?

Each case compiles a model, once with the pass alone and once per plan beside the standard passes,
takes one training step of the result with all ranks emulated, and asks four things:

* invariants: after every pass the program is in the dialect, its placements follow by the rules;
* equality: the loss and every gradient are what the pass promises (see `_Trial._expected`);
* determinism: a second run of the passes gives the same program;
* time: of the pass itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor, nn

from ilm_compile.errors import IlmCompileError, PlanError, VerificationError
from ilm_compile.passes import (
    Pass,
    PassReport,
    check_program,
    lower,
    order_passes,
    run_passes,
    standard_passes,
)
from ilm_compile.program.copy import copy_program
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.program.values import tensors_of
from ilm_compile.schedule import build
from ilm_compile.verify import zoo
from ilm_compile.verify.emulate import Step, emulate
from ilm_compile.verify.promote import promoted_float32

ROWS, MICROBATCHES = 2, 2
GRADIENT_FLOOR = 1e-5  # of the global norm: some gradients are zero in theory
# What the order of sums may change, by the least precise dtype that a gradient flows through.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
HEADINGS = (
    *("model", "plan", "passes", "loss error", "gradient error", "allowed", "ms", "result"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One model under one plan. Errors are relative, and NaN where the case did not get so far.

    `allowed` bounds both errors, only the loss's where the pass alone changes numerics. `changed`:
    whether the pass did anything here. `seconds` is the time of the pass. A pass that raises
    `PlanError` has refused the case, which is its right.
    """

    model: str
    plan: str
    passes: str
    outcome: Literal["ok", "refused", "failed"]
    detail: str = ""
    loss_error: float = float("nan")
    gradient_error: float = float("nan")
    allowed: float = float("nan")
    changed: bool = False
    seconds: float = float("nan")


@dataclass(frozen=True, slots=True)
class PassCheck:
    """What `check_pass` found; `str` is a table, one line per case, and the reasons below it."""

    name: str
    cases: tuple[Case, ...]
    seconds: float

    @property
    def failures(self) -> list[str]:
        """A sentence per reason for which cases failed, and one if no case could be run."""
        found = _reasons(self.cases, "failed")
        if not any(case.outcome == "ok" for case in self.cases) and not found:
            reason = self.cases[0].detail if self.cases else "no models or plans were given"
            found.append(f"no case was run: {reason}")
        return found

    @property
    def ok(self) -> bool:
        """Whether no case failed and at least one was run."""
        return not self.failures

    def raise_if_failed(self) -> None:
        """Raise `VerificationError` with the whole table unless `ok`."""
        if not self.ok:
            raise VerificationError(str(self))

    def __str__(self) -> str:
        rows = [HEADINGS, *map(_row, self.cases)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADINGS))]
        lines = [f"check_pass {self.name}: {'ok' if self.ok else 'FAILED'} ({self.seconds:.1f} s)"]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        notes = self.failures or [f"refused: {text}" for text in _reasons(self.cases, "refused")]
        lines += ["", *notes] if notes else []
        if self.ok and not any(case.changed for case in self.cases):
            lines += ["", "the pass changed no program: this says little about it"]
        return "\n".join(lines)


def check_pass(
    step: Pass,
    *,
    models: Mapping[str, Callable[[], nn.Module]] | None = None,
    plans: Sequence[Plan] | None = None,
    dtype: torch.dtype = torch.float64,
) -> PassCheck:
    """Return whether `step` does what it declares, on every model under every plan.

    `models` are functions that build a model of (input_ids, labels) with 64 tokens or more, by
    name; `plans` are what the standard passes are run for. None takes those of
    `ilm_compile.verify.zoo`. `dtype` is that of the weights: float64 shows the smallest mistake;
    float32 is for passes that want no other, with bounds to match.
    """
    start = time.perf_counter()
    cases: list[Case] = []
    for name, make in (zoo.MODELS if models is None else models).items():
        trial = _Trial(step, name, zoo.make_model(make).to(dtype))
        cases += trial.run(zoo.PLANS if plans is None else plans)
    return PassCheck(step.name, tuple(cases), time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class _Compiled:
    program: Program
    seconds: float
    changed: bool


class _Trial:
    """The cases of one model, which is traced once."""

    def __init__(self, step: Pass, name: str, model: nn.Module) -> None:
        self.step, self.name, self.model = step, name, model
        example = {key: ((ROWS, zoo.SEQ), torch.int64) for key in ("input_ids", "labels")}
        with promoted_float32():
            self.traced = trace(model, example_inputs=example)
        self.original = self._take_step(copy_program(self.traced))
        self.alone: Step | None = None  # of the program that only the pass has changed

    def run(self, plans: Sequence[Plan]) -> Iterator[Case]:
        """Yield a case for the pass alone, if it can be, and one per plan."""
        if self.step.requires <= self.traced.facts:
            yield self._case("-", self.traced.plan, [])
        for plan in plans:
            others = [step for step in standard_passes(plan) if step.name != self.step.name]
            yield self._case(_plan_name(plan), plan, others)

    def _case(self, label: str, plan: Plan, others: list[Pass]) -> Case:
        passes = "standard" if others else "alone"
        fixed = {"model": self.name, "plan": label, "passes": passes}
        try:
            compiled = self._compile(plan, others)
            _refuse_difference(compiled.program, self._compile(plan, others).program)
            found = self._take_step(compiled.program)
            if not others:
                self.alone = found
            expected, allowed, strict = self._expected(compiled.program, is_alone=not others)
            loss, gradients = _errors(found, expected)
        except PlanError as error:
            return Case(**fixed, outcome="refused", detail=_first_line(error))  # type: ignore[arg-type]
        except Exception as error:  # whatever a pass does, the report goes on
            kind = "" if isinstance(error, IlmCompileError) else f"{type(error).__name__}: "
            detail = f"{kind}{_first_line(error)}"
            return Case(**fixed, outcome="failed", detail=detail)  # type: ignore[arg-type]
        worst = max(gradients, key=gradients.__getitem__)
        wrong = [f"loss is off by {loss:.1e}"] if not loss <= allowed else []
        if strict and not gradients[worst] <= allowed:
            wrong.append(f"gradient of {worst} is off by {gradients[worst]:.1e}")
        return Case(
            **fixed,
            outcome="failed" if wrong else "ok",
            detail=f"{' and '.join(wrong)}, allowed is {allowed:.1e}" if wrong else "",
            loss_error=loss,
            gradient_error=gradients[worst],
            allowed=allowed,
            changed=compiled.changed,
            seconds=compiled.seconds,
        )

    def _expected(self, program: Program, *, is_alone: bool) -> tuple[Step, float, bool]:
        """Return what a step must equal, to what relative error, and whether gradients count too.

        A pass that preserves numerics must equal the original model, bit for bit if its tolerance
        is 0 and nothing else was done. One that changes them must keep the loss within its
        tolerance; but what it computes must be the same under every plan.
        """
        allowed = 0.0 if is_alone else _rounding(program)
        if self.step.numerics == "preserving":
            return self.original, max(self.step.tolerance, allowed), True
        if is_alone or self.alone is None:
            return self.original, max(self.step.tolerance, allowed), False
        return self.alone, allowed, True

    def _compile(self, plan: Plan, others: list[Pass]) -> _Compiled:
        program = copy_program(self.traced)
        program.plan = plan
        passes = [*others, self.step]
        states, reports = [_text(program)], list[PassReport]()

        @contextmanager
        def validate(step: Pass, program: Program) -> Iterator[None]:
            yield
            check_program(program)
            states.append(_text(program))

        run_passes(program, passes, callback=reports.append, validate=validate)
        names = [step.name for step in order_passes(passes, self.traced.facts)]
        position = names.index(self.step.name)
        changed = states[position] != states[position + 1]
        return _Compiled(program, reports[position].seconds, changed)

    def _take_step(self, program: Program) -> Step:
        lowered = lower(program)
        num_chunks = program.plan.num_chunks
        schedule = build(
            program.plan.schedule,
            pp=len(lowered.stages) // num_chunks,
            num_microbatches=MICROBATCHES,
            num_chunks=num_chunks,
        )
        return emulate(lowered, schedule, self.model, [_batch()])[0]


def _batch() -> dict[str, Tensor]:
    """Return a global batch whose micro-batches have unequal numbers of targets."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS * MICROBATCHES, zoo.SEQ)
    ids, labels = (torch.randint(zoo.VOCAB, shape, generator=generator) for _ in range(2))
    for row in range(shape[0]):
        labels[row, : 2 * row] = -100
    return {"input_ids": ids, "labels": labels}


def _errors(found: Step, expected: Step) -> tuple[float, dict[str, float]]:
    """Return the relative errors of the loss and of each gradient."""
    loss = float((found.loss - expected.loss).abs() / expected.loss.abs())
    norm = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    errors = {}
    for name, gradient in expected.gradients.items():
        difference = found.gradients.get(name, torch.zeros_like(gradient)) - gradient
        errors[name] = float(difference.norm() / gradient.norm().clamp_min(GRADIENT_FLOOR * norm))
    return loss, errors


def _refuse_difference(first: Program, second: Program) -> None:
    lines = zip_longest(_text(first).splitlines(), _text(second).splitlines(), fillvalue="nothing")
    for one, two in lines:
        if one != two:
            raise VerificationError(
                f"a second run of the passes gives another program: {two.strip()} where there was "
                f"{one.strip()}; do not iterate over sets or draw random numbers"
            )


def _rounding(program: Program) -> float:
    values = (v for node in gradient_nodes(program.graph) for v in tensors_of(node.meta["val"]))
    return max(ROUNDING[value.dtype] for value in values)


def _text(program: Program) -> str:
    return "\n".join([program.dump(), repr(program.plan), *program.decisions, *program.warnings])


def _plan_name(plan: Plan) -> str:
    default = Plan(num_microbatches=plan.num_microbatches)
    fields = [name for name in Plan.__dataclass_fields__ if name not in ("tp", "pp")]
    given = [f for f in fields if getattr(plan, f) != getattr(default, f)]
    return " ".join(f"{name}={getattr(plan, name)}" for name in ("tp", "pp", *given))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _reasons(cases: Sequence[Case], outcome: str) -> list[str]:
    """Return a sentence per distinct detail of the cases of this outcome."""
    titles: dict[str, list[str]] = {}
    for case in cases:
        if case.outcome == outcome:
            where = case.passes if case.plan == "-" else case.plan
            titles.setdefault(case.detail, []).append(f"{case.model} ({where})")
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {detail}"
        for detail, names in titles.items()
    ]


def _row(case: Case) -> tuple[str, ...]:
    errors = (case.loss_error, case.gradient_error, case.allowed)
    numbers = [f"{value:.1e}" for value in errors] + [f"{case.seconds * 1e3:.1f}"]
    shown = ["-" if number == "nan" else number for number in numbers]
    return (case.model, case.plan, case.passes, *shown, case.outcome)

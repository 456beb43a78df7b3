"""`check_pass`: tries a pass on a zoo of small models and plans: does it keep its word?

Each case compiles a model, with the pass alone and once per plan beside the standard passes, takes
one training step of the result with all ranks emulated, and asks four things:

* invariants: after every pass the program is in the dialect, its placements follow by the rules;
* equality: the loss and every gradient are what the pass promises (see `_Trial._expected`), however
  the global batch is cut: into 1, 2 and 4 micro-batches of unequal numbers of targets, over 1 and 2
  data-parallel ranks;
* determinism: a second run of the passes gives the same program;
* time: of the pass itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import zip_longest
from math import inf
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
from ilm_compile.proof import zoo
from ilm_compile.proof.emulate import Step, emulate
from ilm_compile.proof.promote import promoted_float32
from ilm_compile.proof.reference import single_device_step
from ilm_compile.schedule import build

ROWS = 8  # of the global batch, where the numbers of micro-batches and ranks divide it
ALONE = ((1, 1), (4, 1), (2, 2))  # micro-batches and ranks that the pass alone is tried with
GRADIENT_FLOOR = 1e-5  # of the global norm: some gradients are zero in theory
# What the order of sums may change, by the least precise dtype that a gradient flows through.
ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
HEADINGS = (
    *("model", "plan", "passes", "loss error", "gradient error", "allowed", "changed", "ms"),
    "result",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One model under one plan. Errors are relative, and NaN where the case did not get so far.

    `plan` names the mesh and the number of micro-batches too. `allowed` bounds both errors, only
    the loss's where the pass alone changes numerics, on the whole batch in one piece. `changed`:
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
        lines += ["", *silent] if (silent := self._unchanged()) else []
        return "\n".join(lines)

    def _unchanged(self) -> list[str]:
        """Return in words for which models the pass did nothing at all."""
        run = [case for case in self.cases if case.outcome == "ok"]
        changed = {case.model for case in self.cases if case.changed}
        names = list(dict.fromkeys(case.model for case in run if case.model not in changed))
        if not names:
            return []
        if not changed:
            return ["the pass changed no program: this says little about it"]
        return [f"the pass changed nothing in {', '.join(names)}: these say little about it"]


def check_pass(
    step: Pass,
    *,
    models: Mapping[str, Callable[[], nn.Module]] | None = None,
    plans: Sequence[Plan] | None = None,
    dtype: torch.dtype = torch.float64,
) -> PassCheck:
    """Return whether `step` does what it declares, on every model under every plan.

    `models` are functions that build a model of (input_ids, labels) with 64 tokens or more, by
    name; `plans` are what the standard passes are run for, each with its number of micro-batches,
    every second one over two data-parallel ranks, a single one over one and two. None takes those
    of `ilm_compile.proof.zoo`. `dtype` is that of the weights: float64 shows the smallest mistake;
    float32 is for passes that want no other, with bounds to match.
    """
    start = time.perf_counter()
    cases: list[Case] = []
    for name, make in (zoo.MODELS if models is None else models).items():
        further = zoo.INPUTS.get(name, ()) if models is None or make is zoo.MODELS.get(name) else ()
        trial = _Trial(step, name, zoo.make_model(make).to(dtype), further)
        cases += trial.run(zoo.PLANS if plans is None else plans)
    return PassCheck(step.name, tuple(cases), time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class _Compiled:
    program: Program
    seconds: float
    changed: bool


class _Trial:
    """The cases of one model. It is traced once per number of rows that a micro-batch has."""

    def __init__(self, step: Pass, name: str, model: nn.Module, further: Sequence[str]) -> None:
        self.step, self.name, self.model = step, name, model
        self.batch = cache(partial(make_batch, further=further))  # of a number of rows
        self.traced = cache(self._trace)
        self.original = cache(self._original)
        self.alone = cache(self._alone)

    def run(self, plans: Sequence[Plan]) -> Iterator[Case]:
        """Yield the cases of the pass alone, if it can be, and one or two per plan."""
        if self.step.requires <= self.traced(ROWS).facts:
            for microbatches, dp in ALONE:
                yield self._case(Plan(num_microbatches=microbatches), dp, [])
        for index, plan in enumerate(plans):
            others = [step for step in standard_passes(plan) if step.name != self.step.name]
            for dp in (1, 2) if len(plans) == 1 else (1 + index % 2,):
                yield self._case(plan, dp, others)

    def _case(self, plan: Plan, dp: int, others: list[Pass]) -> Case:
        label, passes = _plan_name(plan, dp), "standard" if others else "alone"
        fixed = {"model": self.name, "plan": label, "passes": passes}
        rows = max(1, ROWS // (plan.num_microbatches * dp))
        try:
            compiled = self._compile(plan, others, rows)
            _refuse_difference(compiled.program, self._compile(plan, others, rows).program)
            found = self._take_step(compiled.program, plan, dp, rows)
            total = rows * plan.num_microbatches * dp
            expected, allowed, strict = self._expected(compiled.program, total, bool(others))
            loss, gradients = _errors(found, expected)
            is_exact = self.step.numerics == "preserving" and self.step.tolerance == 0
            bits = "" if others or not is_exact else self._other_bits(found, plan, dp, rows)
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
        detail = f"{' and '.join(wrong)}, allowed is {allowed:.1e}" if wrong else bits
        return Case(
            **fixed,
            outcome="failed" if detail else "ok",
            detail=detail,
            loss_error=loss,
            gradient_error=gradients[worst],
            allowed=allowed,
            changed=compiled.changed,
            seconds=compiled.seconds,
        )

    def _expected(self, program: Program, rows: int, has_others: bool) -> tuple[Step, float, bool]:
        """Return what a step must equal, to what relative error, and whether gradients count too.

        All is compared with the whole global batch in one piece. A pass that preserves numerics
        must equal the original model. One that changes them must keep the loss within its
        tolerance; but what it computes on the whole batch it must compute however that is cut, and
        under every plan.
        """
        allowed = max(self.step.tolerance, _rounding(program))
        if self.step.numerics == "preserving":
            return self.original(rows), allowed, True
        alone = self.alone(rows)
        is_whole = not has_others and program.plan.num_microbatches == 1
        if alone is None or is_whole:
            return self.original(rows), allowed, False
        return alone, _rounding(program), True

    def _trace(self, rows: int) -> Program:
        example = {name: ((rows, *x.shape[1:]), x.dtype) for name, x in self.batch(rows).items()}
        with promoted_float32():
            return trace(self.model, example_inputs=example)

    def _original(self, rows: int) -> Step:
        """Return the step of the model itself on a global batch of `rows`."""
        with promoted_float32():
            return single_device_step(self.model, self.batch(rows))

    def _alone(self, rows: int) -> Step | None:
        """Return the step of what the pass alone makes of the model, the batch in one piece."""
        if not self.step.requires <= self.traced(rows).facts:
            return None
        return self._take_step(self._compile(Plan(), [], rows).program, Plan(), 1, rows)

    def _other_bits(self, found: Step, plan: Plan, dp: int, rows: int) -> str:
        """Return how the step of an exact pass is not the model's, bit for bit, if cut alike."""
        same = self._take_step(copy_program(self.traced(rows)), plan, dp, rows)
        loss, gradients = _errors(found, same)
        worst = max(gradients, key=gradients.__getitem__)
        if loss == gradients[worst] == 0:
            return ""
        return (
            f"loss is off by {loss:.1e} and gradient of {worst} by {gradients[worst]:.1e}; "
            "with tolerance 0 nothing may change, not even the order of a sum"
        )

    def _compile(self, plan: Plan, others: list[Pass], rows: int) -> _Compiled:
        program = copy_program(self.traced(rows))
        program.plan = plan
        passes = [*others, self.step]
        states, reports = [_state(program)], list[PassReport]()

        @contextmanager
        def validate(step: Pass, program: Program) -> Iterator[None]:
            yield
            check_program(program)
            states.append(_state(program))

        run_passes(program, passes, callback=reports.append, validate=validate)
        names = [step.name for step in order_passes(passes, self.traced(rows).facts)]
        position = names.index(self.step.name)
        changed = states[position] != states[position + 1]
        return _Compiled(program, reports[position].seconds, changed)

    def _take_step(self, program: Program, plan: Plan, dp: int, rows: int) -> Step:
        lowered = lower(program)
        num_chunks = program.plan.num_chunks
        schedule = build(
            program.plan.schedule,
            pp=len(lowered.stages) // num_chunks,
            num_microbatches=plan.num_microbatches,
            num_chunks=num_chunks,
        )
        batch = self.batch(rows * plan.num_microbatches * dp)
        return emulate(lowered, schedule, self.model, [batch], dp=dp)[0]


def make_batch(rows: int, further: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return a global batch: ids over the whole vocabulary, and unequal numbers of targets.

    Of the labels, some in the first, middle and last column are ignored, and one whole row.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (rows, zoo.SEQ)
    ids, labels = (_all_ids(shape, generator) for _ in range(2))
    for row in range(rows):
        labels[row, : row % (zoo.SEQ // 2)] = zoo.IGNORED
    labels[::3, 0] = labels[1::3, zoo.SEQ // 2] = labels[2::3, -1] = zoo.IGNORED
    labels[rows // 2 + 1 :][:1] = zoo.IGNORED
    given = {name: zoo.FURTHER[name](shape) for name in further}
    return {"input_ids": ids, "labels": labels, **given}


def _all_ids(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return every id, in random order and as often as there is room."""
    count = shape[0] * shape[1]
    return (torch.randperm(count, generator=generator) % zoo.VOCAB).view(shape)


def _errors(found: Step, expected: Step) -> tuple[float, dict[str, float]]:
    """Return the relative errors of the loss and of each gradient."""
    loss = float((found.loss - expected.loss).abs() / expected.loss.abs())
    norm = torch.stack([gradient.norm() for gradient in expected.gradients.values()]).norm()
    errors = {}
    for name in expected.gradients | found.gradients:
        ours, theirs = found.gradients.get(name), expected.gradients.get(name)
        if ours is None or theirs is None:  # a parameter that is trained in one of them only
            errors[name] = inf
            continue
        size = theirs.norm().clamp_min(GRADIENT_FLOOR * norm)
        errors[name] = float((ours - theirs).norm() / size)
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


def _state(program: Program) -> str:
    """Return all that a pass can change, but for what it says."""
    places = [(n.name, n.meta.get("region"), n.meta.get("stage")) for n in program.calls()]
    rest = (program.plan, program.regions, program.variables, program.output_names, places)
    return "\n".join([program.dump(), *map(repr, rest)])


def _text(program: Program) -> str:
    return "\n".join([_state(program), *program.decisions, *program.warnings])


def _plan_name(plan: Plan, dp: int) -> str:
    shown = ("tp", "pp", "num_microbatches")
    fields = [name for name in Plan.__dataclass_fields__ if name not in shown]
    given = [f"{f}={getattr(plan, f)}" for f in fields if getattr(plan, f) != getattr(Plan(), f)]
    cut = f"tp={plan.tp} pp={plan.pp} dp={dp} microbatches={plan.num_microbatches}"
    return " ".join((cut, *given))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _reasons(cases: Sequence[Case], outcome: str) -> list[str]:
    """Return a sentence per distinct detail of the cases of this outcome."""
    titles: dict[str, list[str]] = {}
    for case in cases:
        if case.outcome == outcome:
            alone = "alone, " if case.passes == "alone" else ""
            titles.setdefault(case.detail, []).append(f"{case.model} ({alone}{case.plan})")
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {detail}"
        for detail, names in titles.items()
    ]


def _row(case: Case) -> tuple[str, ...]:
    errors = (case.loss_error, case.gradient_error, case.allowed)
    numbers = [*(f"{value:.1e}" for value in errors), f"{case.seconds * 1e3:.1f}"]
    *shown, milliseconds = ("-" if number == "nan" else number for number in numbers)
    changed = "-" if milliseconds == "-" else "yes" if case.changed else "no"
    return (case.model, case.plan, case.passes, *shown, changed, milliseconds, case.outcome)

"""`verify`: proof, in one process and before launch, that a plan trains the same model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.partitioning import make_plan
from ilm_compile.passes import Pass, lower, run_passes
from ilm_compile.passes.standard import plan_passes, with_passes
from ilm_compile.program.copy import copy_program
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Input, Program
from ilm_compile.program.trace import ExampleInputs, LossFn, trace
from ilm_compile.proof import translation as _translation  # noqa: F401 - validate="numerics"
from ilm_compile.proof.bounds import check_bounds
from ilm_compile.proof.capture import model_step
from ilm_compile.proof.compare import Comparison, compare
from ilm_compile.proof.dtypes import check_dtypes
from ilm_compile.proof.exact import exact
from ilm_compile.proof.fit import fits_whole
from ilm_compile.proof.graph_steps import graph_steps, without_dropout
from ilm_compile.proof.inputs import LEVELS, corner_batch
from ilm_compile.proof.precision import check_precision
from ilm_compile.proof.promote import promoted_float32
from ilm_compile.proof.report import Check, Report
from ilm_compile.proof.static import check_variables
from ilm_compile.proof.subject import Subject
from ilm_compile.proof.values import check_values
from ilm_compile.proof.weights import tensors_for
from ilm_compile.runtime.forms import dress
from ilm_compile.runtime.materialize import Binding
from ilm_compile.shapes import (
    Shapes,
    check_alike,
    example_of,
    passes_like,
    plan_like,
    read_shapes,
    shown,
)
from ilm_compile.sharding.loss_terms import check_loss


def verify(
    model: nn.Module,
    *,
    example_inputs: ExampleInputs | None = None,
    loss_fn: LossFn | None = None,
    passes: Sequence[Pass | str] = (),
    plan: Plan | None = None,
    tolerance: float = 1e-10,
    shapes: Shapes = (),
    **keywords: Any,
) -> Report:
    """Return whether `model` under the plan trains exactly as it does on a single device.

    Keywords as for `partition`; `shapes` as for
    `parallelize`: the program of each is proven in the same way, and that it can run on the modules
    of the first. What is proven is the
    program that would run, layer by layer:

    1. types: every placement follows by the rules after every pass, every shape and dtype computed
       anew, inputs, outputs and variables as the model has them, the schedule complete and free of
       cyclic waits;
    2. capture: the traced graph gives the loss and the gradients of the model itself on a whole
       global batch; where the model is too large to be run here, a note says so;
    3. regions: each distinct region of the program against the same region of the traced graph, on
       all ranks in float64: what it gives, the gradients of what it takes and of its weights. Alike
       are regions of equal calls, constants, buffers, placements and trained weights. They are run
       at their own size, or where that is too large with sizes made smaller in both graphs;
    4. precision: under a compute dtype, the rounding of every node against that of the products
       alone (see `ilm_compile.proof.precision`);
    5. step: two optimizer steps of all ranks, emulated in this process by the runtime's own code
       and schedule, against the traced graph's: loss, outputs, every gradient, their norm, weights;
    6. bisect: on a difference, the first pass that makes one, and its first node.

    Batches reach every corner (see `ilm_compile.proof.inputs`); dropout is on, with the plan's
    masks. No process group, GPU or weight is needed. Never raises for a plan that fails: see
    `Report.failures` and `Report.raise_if_failed`.
    """
    dp = keywords.pop("dp", None) or (plan.dp if isinstance(plan, Plan) else None) or 1
    proof = _Proof(_title(model, plan, keywords, dp))
    options = _Options(model, dp, loss_fn, passes, tolerance)
    first = _prove_shape(proof, options, example_inputs, plan, keywords)
    if first is not None and shapes:
        further: list[dict[str, Input]] = []
        with proof.check("shapes"):
            further = read_shapes(first.inputs, shapes)
        for inputs in further:
            proof.suffix = f" of {shown(inputs)}"
            _prove_shape(proof, options, example_of(inputs, first), plan, keywords, like=first)
    return proof.report()


@dataclass(frozen=True, slots=True)
class _Options:
    """What does not depend on the shape."""

    model: nn.Module
    dp: int
    loss_fn: LossFn | None
    passes: Sequence[Pass | str]
    tolerance: float


def _prove_shape(
    proof: _Proof,
    options: _Options,
    example_inputs: ExampleInputs | None,
    plan: Plan | None,
    keywords: Mapping[str, Any],
    like: Program | None = None,
) -> Program | None:
    """Prove the program of one shape; it, or None if it cannot even be made.

    like: the one whose modules it is to run on.
    """
    model, dp, loss_fn = options.model, options.dp, options.loss_fn
    with proof.check("types") as note:
        settled = make_plan(plan, **keywords)
        settled = settled if like is None else plan_like(like, settled)
        settled = with_passes(settled, options.passes, ())
        with _casts_of(model):
            traced = trace(model, example_inputs=example_inputs, loss_fn=loss_fn)
        traced.plan = settled
        before = len(traced.warnings)
        check_loss(traced, num_slices=settled.num_microbatches * dp)
        is_additive = len(traced.warnings) == before  # no term that is per micro-batch by nature
        program = copy_program(traced)
        every = passes_like(like, plan_passes(program, options.passes))
        run_passes(program, every, disable=settled.disable)
        check_values(program)
        check_variables(traced, program)
        check_dtypes(traced, program)
        check_bounds(traced, program)
        stages = lower(program).stages
        if like is not None:
            check_alike(like, program)
            for running, other in zip(lower(like).stages, stages, strict=True):
                dress(running, other, 1, Binding(torch.device("cpu")))
        note(f"{len(list(program.calls()))} nodes, {len(program.pass_log)} passes, the schedule")
    if proof.failures:
        return None
    proof.warnings += traced.warnings
    subject = Subject(traced, program, model, dp, passes=options.passes)
    with proof.check("capture") as note:
        slices = subject.num_slices if is_additive else 1
        note(_capture(proof, subject, loss_fn, slices, options.tolerance))
    prove_program(proof, subject, options.tolerance)
    return program


def prove_program(proof: _Proof, subject: Subject, tolerance: float) -> None:
    """Prove the compiled program of `subject` against the traced graph: regions and steps."""
    with proof.check("regions") as note:
        note(_regions(proof, subject, tolerance))
    if subject.program.plan.dtype is not None and not proof.failures:
        with proof.check("precision") as note:
            note(check_precision(subject))
    if not proof.failures:
        with proof.check("step") as note:
            note(_step(proof, subject, tolerance))


def _casts_of(model: nn.Module) -> AbstractContextManager[None]:
    """A float64 model that casts to float32 inside is proven with those casts promoted."""
    is_double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return promoted_float32() if is_double else nullcontext()


def _title(model: nn.Module, plan: Plan | None, keywords: Mapping[str, Any], dp: int) -> str:
    """Return the model's class and what of the plan is not the default."""
    plain = Plan()
    fields = Plan.__dataclass_fields__ if plan is not None else ()
    given = {n: getattr(plan, n) for n in fields if getattr(plan, n) != getattr(plain, n)}
    given.pop("dp", None)  # said last
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
    suffix: str = ""  # of the names of checks

    def report(self) -> Report:
        return Report(self.title, self.checks, self.failures, self.warnings, **self.errors)

    def note_errors(self, *, loss: float = 0.0, grad: float = 0.0, weight: float = 0.0) -> None:
        """Keep the largest errors."""
        for name, error in (("loss", loss), ("grad", grad), ("weight", weight)):
            key = f"max_{name}_error"
            self.errors[key] = max(error, self.errors.get(key, 0.0))

    def note_comparison(self, found: Comparison) -> None:
        self.note_errors(loss=found.loss, grad=found.max_gradient, weight=found.max_weight)

    @contextmanager
    def check(self, name: str) -> Iterator[Callable[[str], None]]:
        """Time a layer and turn what it raises into a failure."""
        start = time.perf_counter()
        notes: list[str] = []
        failed = ""
        name += self.suffix
        try:
            yield notes.append
        except IlmCompileError as error:
            failed = str(error)
        except Exception as error:  # a program may break in any way; its report goes on
            failed = f"{type(error).__name__}: {error}"
        detail = failed.splitlines()[0][:120] if failed else "; ".join(notes)
        self.checks.append(Check(name, not failed, detail, time.perf_counter() - start))
        self.failures += [f"{name}: {failed}"] if failed else []


def _capture(
    proof: _Proof, subject: Subject, loss_fn: LossFn | None, slices: int, tolerance: float
) -> str:
    """Compare the traced graph with the model itself, nothing dropped; return how far it is."""
    if not fits_whole(subject.traced, slices):
        return "not run: the model is too large here; the graph is torch.export's"
    traced = exact(without_dropout(subject.traced))
    tensors = tensors_for(traced, subject.buffers)
    assert subject.model is not None
    for level in range(len(LEVELS)):
        batch = corner_batch(traced, slices, level=level)
        try:
            expected = model_step(
                subject.model, tensors, batch, loss_fn=loss_fn, arguments=traced.arguments
            )
        except (IndexError, RuntimeError):
            if level == len(LEVELS) - 1:
                raise
            continue
        if bool(expected.loss.isfinite()):
            break
    (step,) = graph_steps(traced, tensors, [batch], num_slices=slices, max_norm=None)
    found = compare(step, replace(expected, outputs=_of_rows(expected.outputs, step.outputs)))
    proof.note_comparison(found)
    if wrong := found.describe(tolerance):
        raise IlmCompileError(f"the traced graph is not equal to the model: {wrong}")
    errors = f"loss {found.loss:.0e}, gradient {found.max_gradient:.0e}"
    return f"the model itself, {slices} micro-batches in one piece; largest errors: {errors}"


def _of_rows(whole: Mapping[str, Tensor], joined: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of a whole batch that micro-batches give row by row."""
    found = {name: value if value.dim() else value[None] for name, value in whole.items()}
    return {n: v for n, v in found.items() if n in joined and joined[n].shape == v.shape}


def _regions(proof: _Proof, subject: Subject, tolerance: float) -> str:
    """Compare every distinct piece, and on a difference say where it comes from."""
    fit, compared = subject.regions()
    largest = 0.0
    for piece, found, locate in compared:
        if not found.is_finite:
            proof.warnings.append(
                f"regions: {piece.region} gives no numbers on any batch that was tried; there the "
                "types alone vouch for it"
            )
            continue
        largest = max(largest, found.largest)
        proof.note_errors(grad=found.largest)
        if not found.largest <= tolerance:
            node = locate(tolerance) or f"the {found.worst()}"
            raise IlmCompileError(
                f"{piece.region} is not equal to the same region of the traced graph: "
                f"{found.worst()}; {_blame(subject, tolerance)}{node}"
            )
    size = fit.note or "at its own size"
    count = f"{len(subject.distinct)} distinct of {len(subject.pieces)}"
    return f"{count}, {size}; largest error {largest:.0e}"


def _blame(subject: Subject, tolerance: float) -> str:
    """Return the first pass after which a region differs, in words; nothing if none does alone."""
    for name, program in subject.prefixes():
        before = Subject(subject.traced, program, subject.model, passes=subject.passes)
        try:
            _, compared = before.regions()
            wrong = any(not f.largest <= tolerance for _, f, _ in compared if f.is_finite)
        except IlmCompileError:
            continue
        if wrong:
            return f"after pass {name}, "
    return ""


def _step(proof: _Proof, subject: Subject, tolerance: float) -> str:
    """Take steps both ways and compare them."""
    fit = subject.fit_step()
    try:
        steps, expected, lowered, dp = subject.steps(fit)
    except IlmCompileError as error:  # ranks that must agree do not
        where = f"; {subject.narrow(tolerance)}" if fit.is_own_size else ""
        raise IlmCompileError(f"{error}{where}") from error
    plan = subject.program.plan
    for number, (step, right) in enumerate(zip(steps, expected, strict=True), 1):
        found = compare(step, right)
        proof.note_comparison(found)
        if wrong := found.describe(tolerance):
            raise IlmCompileError(
                f"optimizer step {number} is not equal to the traced graph's: {wrong}"
                f"{_tied(lowered, found, tolerance)}; every region is right by itself, so the "
                "difference arises in lowering, schedule or runtime: "
                f"{subject.narrow(tolerance) if fit.is_own_size else 'run a smaller plan'}"
            )
    ranks = f"{plan.ranks_per_replica * dp} ranks emulated, {len(steps)} steps"
    return f"{ranks}, {fit.note or 'at its own size'}; largest errors: {found.summary()}"


def _tied(lowered: LoweredProgram, found: Comparison, tolerance: float) -> str:
    """Return a hint if parameters that several stages hold have wrong gradients."""
    return "".join(
        f"; {name} is held by stages {', '.join(map(str, owners))}, whose gradients must be summed"
        for name in found.wrong_gradients(tolerance)
        if len(owners := lowered.owners(name)) > 1
    )

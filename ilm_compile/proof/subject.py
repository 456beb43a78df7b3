"""What a proof is about: the traced graph, the compiled program, and what each is run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from torch import Tensor, nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.passes import Pass, lower, order_passes, run_passes
from ilm_compile.passes.standard import plan_passes
from ilm_compile.program.copy import copy_program
from ilm_compile.program.lowered import LoweredProgram
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.proof.alike import signature
from ilm_compile.proof.compare import compare
from ilm_compile.proof.emulate import Step, emulate
from ilm_compile.proof.exact import exact
from ilm_compile.proof.fit import Fit, fit_pieces, fit_step
from ilm_compile.proof.graph_steps import graph_steps
from ilm_compile.proof.inputs import LEVELS, corner_batch, microbatch
from ilm_compile.proof.locate import Difference
from ilm_compile.proof.narrow import narrow
from ilm_compile.proof.pieces import Piece, pieces
from ilm_compile.proof.promote import float64_default
from ilm_compile.proof.regions import Found, Trial
from ilm_compile.proof.weights import buffer_values, tensors_for
from ilm_compile.schedule import Schedule, schedule_of

STEPS = 2
MOST_REPLICAS = 2  # of a step that had to be made smaller: each runs the same graph


@dataclass
class Subject:
    """A compiled `program` beside the `traced` graph that it must equal, with `dp` replicas.

    model: where buffers have their values; None for a program without one.
    """

    traced: Program
    program: Program
    model: nn.Module | None = None
    dp: int = 1
    schedule: Schedule | None = None
    passes: Sequence[Pass | str] = ()
    buffers: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.buffers = buffer_values(self.model, self.traced)
        self.schedule = self.schedule or schedule_of(self.program.plan)

    @cached_property
    def pieces(self) -> list[Piece]:
        """The pieces of the program at its own size."""
        return list(pieces(self.traced, self.program))

    @cached_property
    def signatures(self) -> list[str]:
        """Of each piece, what it shares with those that are alike."""
        return [signature(self.traced, self.program, p, self.buffers) for p in self.pieces]

    @property
    def num_slices(self) -> int:
        """Micro-batches of a global batch."""
        return self.program.plan.num_microbatches * self.dp

    @cached_property
    def distinct(self) -> list[Piece]:
        """One piece of each kind, in order."""
        first = dict(zip(reversed(self.signatures), reversed(self.pieces), strict=True))
        return [p for p, s in zip(self.pieces, self.signatures, strict=True) if first[s] is p]

    def regions(
        self,
    ) -> tuple[Fit, Iterator[tuple[Piece, Found, Callable[..., Difference | None]]]]:
        """Return at what sizes the distinct pieces are run, and the pieces with what was found."""
        fit = self.fit_pieces()
        return fit, self.compared(fit, self.distinct)

    def fit_pieces(self) -> Fit:
        """Return the program at a size at which its distinct pieces can be run."""
        return fit_pieces(self.traced, self.program, self.distinct)

    def compared(
        self, fit: Fit, wanted: Sequence[Piece]
    ) -> Iterator[tuple[Piece, Found, Callable[..., Difference | None]]]:
        """Yield those of the `wanted` pieces as `fit` has them, with how far each is off.

        With each comes what finds its first node that differs by more than a tolerance.
        """
        old, new = exact(fit.traced), exact(fit.program)
        by_key = {key_of(piece): piece for piece in pieces(old, new)}
        batch = corner_batch(old, 1)
        tensors = _Lazy(old, self.buffers)
        for key in map(key_of, wanted):
            piece = by_key[key]
            for level in range(len(LEVELS)):
                inputs = microbatch(old, corner_batch(old, 1, level=level) if level else batch)
                trial = Trial(old, new, tensors.one, inputs)
                found = trial.compare(piece)
                if found.is_finite:
                    break
            yield piece, found, lambda tolerance, t=trial, p=piece: t.locate(p, tolerance)

    def fit_whole(self) -> Fit:
        """Return the program at a size at which one micro-batch can be run."""
        return fit_step(self.traced, self.program, self.pieces, self.signatures, slices=1, ranks=1)

    def fit_step(self) -> Fit:
        """Return the program at a size at which whole steps can be taken."""
        return fit_step(
            self.traced,
            self.program,
            self.pieces,
            self.signatures,
            slices=STEPS * self.num_slices,
            ranks=prod(self.program.plan.axes.values()),
        )

    def steps(self, fit: Fit) -> tuple[list[Step], list[Step], LoweredProgram, int]:
        """Return the program's steps, those expected, the lowered program, and the replicas run."""
        dp = self.dp if fit.is_own_size else min(self.dp, MOST_REPLICAS)
        slices = self.program.plan.num_microbatches * dp
        old, new = exact(fit.traced), exact(fit.program)
        tensors = tensors_for(old, self.buffers)
        batches, expected = self.expected(old, tensors, slices)
        lowered = lower(new)
        assert self.schedule is not None
        with float64_default():
            found = emulate(lowered, self.schedule, tensors, batches, dp=dp, keep_outputs=True)
        return found, expected, lowered, dp

    def expected(
        self, traced: Program, tensors: Mapping[str, Tensor], slices: int
    ) -> tuple[list[dict[str, Tensor]], list[Step]]:
        """Return batches, and the traced graph's steps on them: the richest that give numbers."""
        for level in range(len(LEVELS)):
            batches = [corner_batch(traced, slices, level=level, seed=i) for i in range(STEPS)]
            try:
                steps = graph_steps(traced, tensors, batches, num_slices=slices)
            except (IndexError, RuntimeError):  # a label of -100 that the model looks up, say
                if level == len(LEVELS) - 1:
                    raise
                continue
            if all(bool(step.loss.isfinite()) for step in steps):
                break
        return batches, steps

    def narrow(self, tolerance: float) -> str:
        """Return which simpler plan or batch makes the steps right."""
        old = exact(self.traced)
        tensors = tensors_for(old, self.buffers)
        batches, _ = self.expected(old, tensors, self.num_slices)

        def is_right(plan: Plan, batch: Mapping[str, Tensor]) -> bool:
            slices = plan.num_microbatches * self.dp
            part = {n: v[: old.inputs[n].shape[0] * slices] for n, v in batch.items()}
            program = copy_program(self.traced)
            program.plan = plan
            try:
                run_passes(program, plan_passes(program, self.passes), disable=plan.disable)
                lowered = lower(exact(program))
                with float64_default():
                    steps = emulate(lowered, schedule_of(plan), tensors, [part], dp=self.dp)
                right = graph_steps(old, tensors, [part], num_slices=slices)
            except IlmCompileError:  # the simpler plan is none, or fails in another way
                return False
            return compare(steps[0], right[0]).is_equal(tolerance)

        return narrow(self.program.plan, batches[0], is_right)

    def prefixes(self) -> Iterator[tuple[str, Program]]:
        """Yield what the program was after each of its passes, by the pass's name."""
        program = copy_program(self.traced)
        program.plan = self.program.plan
        every = order_passes(plan_passes(program, self.passes), program.facts)
        for step in (step for step in every if step.name not in program.plan.disable):
            run_passes(program, [step])
            yield step.name, copy_program(program)


@dataclass
class _Lazy:
    """Values of variables, made when they are asked for."""

    program: Program
    buffers: dict[str, Tensor]

    def one(self, name: str) -> Tensor | None:
        return tensors_for(self.program, self.buffers, [name]).get(name)


def key_of(piece: Piece) -> tuple[str, ...]:
    """Return what tells the pieces of a program apart: the names of what they give."""
    return tuple(anchor.node.name for anchor in piece.outputs)

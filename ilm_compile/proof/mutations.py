"""Mutation testing of the proof: broken programs and schedules, and which layer refuses each.

A mutant that no layer refuses is either equivalent (its training step, run as it would be launched,
is the unbroken one's) or missed, and a missed one is a hole in the proof.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ilm_compile.errors import ProgramError
from ilm_compile.passes import lower
from ilm_compile.program.check import check_structure
from ilm_compile.program.program import Program
from ilm_compile.proof import mutate_program, mutate_schedule
from ilm_compile.proof.bounds import check_bounds
from ilm_compile.proof.compare import compare
from ilm_compile.proof.dtypes import check_dtypes
from ilm_compile.proof.emulate import Step, emulate
from ilm_compile.proof.exact import exact
from ilm_compile.proof.precision import check_precision
from ilm_compile.proof.static import check_variables
from ilm_compile.proof.subject import Subject
from ilm_compile.proof.values import check_values
from ilm_compile.proof.weights import tensors_for
from ilm_compile.schedule import Schedule
from ilm_compile.schedule import check as check_schedule
from ilm_compile.sharding import check_placements

LAYERS = ("structure", "variables", "types", "schedule", "regions", "precision", "step")
TOLERANCE = 1e-10  # of the proof
EQUAL = 1e-12  # the same step up to the order of sums


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault: its kind, where it is in words, and what makes the broken program and schedule."""

    kind: str
    what: str
    make: Callable[[Program, Schedule], tuple[Program, Schedule]]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a mutant.

    caught: the message of each layer that refuses it. difference: between its step, run as
    launched, and that of the unbroken program, relative; infinite if it cannot run.
    """

    kind: str
    what: str
    caught: dict[str, str]
    difference: float

    @property
    def outcome(self) -> str:
        """One of "caught", "equivalent" and "missed"."""
        if self.caught:
            return "caught"
        return "missed" if self.alters else "equivalent"

    @property
    def alters(self) -> bool:
        """Whether the step as launched differs from the unbroken one, or cannot be run."""
        return not self.difference <= EQUAL

    def first(self, *, without: str = "") -> str | None:
        """The first layer that refuses it, of those that are not switched off."""
        return next((layer for layer in LAYERS if layer in self.caught and layer != without), None)


def program_mutants(program: Program, *, limit: int | None = None) -> Iterator[Mutant]:
    """Yield the faults that apply to `program`, at most `limit` of a kind, evenly spread."""

    def make(
        place: mutate_program.Place, program: Program, schedule: Schedule
    ) -> tuple[Program, Schedule]:
        node, _, edit = place
        return mutate_program.mutated(program, node, edit), schedule

    size = len(program.graph.nodes)
    for kind, places in mutate_program.KINDS.items():
        for place in spread(list(places(program)), limit, seed=f"{kind} {size}"):
            module = program.source(place[0]).module_path
            what = " ".join(filter(None, (place[0].name, module and f"({module})", place[1])))
            yield Mutant(kind, what, partial(make, place))


def schedule_mutants(schedule: Schedule, *, limit: int | None = None) -> Iterator[Mutant]:
    """Yield the faults that apply to `schedule`, at most `limit` of a kind, evenly spread."""

    def make(wrong: Schedule, program: Program, schedule: Schedule) -> tuple[Program, Schedule]:
        return program, wrong

    for kind, places in mutate_schedule.KINDS.items():
        for what, wrong in spread(list(places(schedule)), limit, seed=f"{kind} {schedule.name}"):
            yield Mutant(kind, what, partial(make, wrong))


def spread(items: list[Any], limit: int | None, seed: str = "") -> list[Any]:
    """Return at most `limit` of `items`, first and last among them, evenly spaced.

    Of one alone `seed` says which.
    """
    if limit is None or len(items) <= limit:
        return items
    if limit == 1:
        return [items[zlib.crc32(seed.encode()) % len(items)]]
    step = (len(items) - 1) / (limit - 1)
    return [items[round(index * step)] for index in range(limit)]


@dataclass
class Trial:
    """Judges mutants of one program. Raises `ProgramError` if that is itself refused.

    traced: the graph it was compiled from. model: where buffers have their values, if anywhere.
    """

    traced: Program
    program: Program
    schedule: Schedule
    model: nn.Module | None = None
    dp: int = 1

    def __post_init__(self) -> None:
        whole = Subject(self.traced, self.program, self.model, self.dp, schedule=self.schedule)
        old = exact(self.traced)
        self.tensors = tensors_for(old, whole.buffers)
        self.batches, self.expected = whole.expected(old, self.tensors, whole.num_slices)
        self.proven: set[str] = set()
        launched = self.program if self._is_rounded else exact(self.program)
        self.launched = self._run(launched, self.schedule)
        refused = self._refusals(self.program, self.schedule)
        step, _ = self._step(self.program, self.schedule)
        if refused or step:
            raise ProgramError(f"mutations: refused before it is broken: {refused} {step}")
        self.proven.update(whole.signatures)

    def judge(self, mutant: Mutant) -> Verdict:
        """Return which layers refuse `mutant`. Every layer is asked, whatever the others say."""
        program, schedule = mutant.make(self.program, self.schedule)
        caught = self._refusals(program, schedule)
        message, difference = self._step(program, schedule)
        if message:
            caught["step"] = message
        return Verdict(mutant.kind, mutant.what, caught, difference)

    def _refusals(self, program: Program, schedule: Schedule) -> dict[str, str]:
        """Return the messages of the layers before the step that refuse."""
        caught: dict[str, str] = {}
        for layer, check in (
            ("structure", partial(_check_structure, program)),
            ("variables", partial(_check_variables, self.traced, program)),
            ("types", partial(check_placements, program)),
            ("schedule", partial(check_schedule, schedule)),
            ("regions", partial(self._check_regions, program)),
            ("precision", partial(self._check_precision, program)),
        ):
            if (message := _refusal(check)) is not None:
                caught[layer] = message
        return caught

    def _check_regions(self, program: Program) -> None:
        """Compare the pieces that the unbroken program does not have."""
        subject = Subject(self.traced, program, self.model)
        new = [
            piece
            for piece in subject.distinct
            if subject.signatures[subject.pieces.index(piece)] not in self.proven
        ]
        for piece, found, _ in subject.compared(subject.fit_pieces(), new):
            if found.is_finite and not found.largest <= TOLERANCE:
                raise ProgramError(f"{piece.region}: {found.worst()}")

    def _check_precision(self, program: Program) -> None:
        check_dtypes(self.traced, program)
        if self._is_rounded:
            check_precision(Subject(self.traced, program, self.model))

    def _step(self, program: Program, schedule: Schedule) -> tuple[str, float]:
        """Return why the steps are refused, and how far they are from the unbroken ones."""
        try:
            steps = self._run(exact(program), schedule)
            for step, right in zip(steps, self.expected, strict=True):
                if wrong := compare(step, right).describe(TOLERANCE):
                    message = f"not equal to the traced graph: {wrong}"
                    return message, _distance(steps, self.launched)
            if self._is_rounded:
                steps = self._run(program, schedule)
        except Exception as error:
            return _words(error), float("inf")
        return "", _distance(steps, self.launched)

    @property
    def _is_rounded(self) -> bool:
        return self.program.plan.dtype is not None

    def _run(self, program: Program, schedule: Schedule) -> list[Step]:
        return emulate(
            lower(program), schedule, self.tensors, self.batches, dp=self.dp, keep_outputs=True
        )


def judge_all(trial: Trial, *, limit: int | None = None) -> Iterator[Verdict]:
    """Yield the verdict on each mutant, at most `limit` of a kind."""
    yield from map(trial.judge, program_mutants(trial.program, limit=limit))
    if trial.schedule.num_ranks > 1:
        yield from map(trial.judge, schedule_mutants(trial.schedule, limit=limit))


def _check_structure(program: Program) -> None:
    check_structure(program)
    check_values(program)
    lower(program)


def _check_variables(traced: Program, program: Program) -> None:
    check_variables(traced, program)
    check_bounds(traced, program)


def _refusal(check: Callable[[], None]) -> str | None:
    """Return the message of the error that `check` raises, None if it raises none."""
    try:
        check()
    except Exception as error:
        return _words(error)
    return None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _distance(steps: Sequence[Step], others: Sequence[Step]) -> float:
    pairs = [compare(step, other) for step, other in zip(steps, others, strict=True)]
    errors = [(p.loss, p.max_gradient, p.max_weight, *p.outputs.values()) for p in pairs]
    return max(e if e == e else float("inf") for each in errors for e in each)

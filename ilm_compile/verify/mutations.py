"""Mutation testing of the proof: broken programs and schedules, and which layer refuses each.

A mutant that no layer refuses is either equivalent (its training step, run as it would be launched,
is the unbroken one's) or missed, and a missed one is a hole in the proof.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from ilm_compile.passes import lower
from ilm_compile.program.check import check_structure
from ilm_compile.program.program import Program
from ilm_compile.schedule import Schedule
from ilm_compile.schedule import check as check_schedule
from ilm_compile.sharding import check_placements
from ilm_compile.verify import mutate_program, mutate_schedule
from ilm_compile.verify.blocks import check_blocks
from ilm_compile.verify.compare import compare
from ilm_compile.verify.emulate import Step, emulate
from ilm_compile.verify.exact import exact
from ilm_compile.verify.promote import promoted_float32
from ilm_compile.verify.reference import single_device_step
from ilm_compile.verify.values import check_values

LAYERS = ("structure", "types", "schedule", "step", "blocks")
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


def program_mutants(
    program: Program, *, limit: int | None = None, outside: Collection[str] = ()
) -> Iterator[Mutant]:
    """Yield the faults that apply to `program`, at most `limit` of a kind, evenly spread.

    outside: names of regions that are to be left alone.
    """

    def make(
        place: mutate_program.Place, program: Program, schedule: Schedule
    ) -> tuple[Program, Schedule]:
        node, _, edit = place
        return mutate_program.mutated(program, node, edit), schedule

    for kind, places in mutate_program.KINDS.items():
        found = [place for place in places(program) if _region(program, place[0]) not in outside]
        for place in spread(found, limit):
            module = program.source(place[0]).module_path
            what = " ".join(filter(None, (place[0].name, module and f"({module})", place[1])))
            yield Mutant(kind, what, partial(make, place))


def _region(program: Program, node: fx.Node) -> str:
    """Return the name of the region of a call, or of the first call that uses a parameter."""
    calls = [n for n in (node, *node.users) if "region" in n.meta]
    return program.regions[calls[0].meta["region"]].name if calls else ""


def schedule_mutants(schedule: Schedule, *, limit: int | None = None) -> Iterator[Mutant]:
    """Yield the faults that apply to `schedule`, at most `limit` of a kind, evenly spread."""

    def make(wrong: Schedule, program: Program, schedule: Schedule) -> tuple[Program, Schedule]:
        return program, wrong

    for kind, places in mutate_schedule.KINDS.items():
        for what, wrong in spread(list(places(schedule)), limit):
            yield Mutant(kind, what, partial(make, wrong))


def spread(items: list[Any], limit: int | None) -> list[Any]:
    """Return at most `limit` of `items`, first and last among them, evenly spaced."""
    if limit is None or len(items) <= limit:
        return items
    step = (len(items) - 1) / max(1, limit - 1)
    return [items[round(index * step)] for index in range(limit)]


@dataclass
class Trial:
    """Judges mutants of one program, which must itself be without fault.

    model: the plain model in float64, whose weights the steps start from. batch: a global one.
    stepped: of a program that is too big to be stepped, the small one that takes the step; mutants
    are then made in the blocks that only the big one has.
    """

    program: Program
    schedule: Schedule
    model: nn.Module
    batch: Mapping[str, Tensor]
    stepped: Program | None = None
    expected: Step = field(init=False)
    launched: Step = field(init=False)

    def __post_init__(self) -> None:
        with promoted_float32():
            self.expected = single_device_step(self.model, self.batch)
        self.launched = self._run(self.program, self.schedule)

    def judge(self, mutant: Mutant) -> Verdict:
        """Return which layers refuse `mutant`. Every layer is asked, whatever the others say."""
        program, schedule = mutant.make(self.program, self.schedule)
        caught: dict[str, str] = {}
        for layer, check in (
            ("structure", partial(_check_structure, program)),
            ("types", partial(check_placements, program)),
            ("schedule", partial(check_schedule, schedule)),
            ("blocks", partial(check_blocks, program, self.stepped or program)),
        ):
            if (message := _refusal(check)) is not None:
                caught[layer] = message
        message, difference = self._step(program, schedule)
        if message:
            caught["step"] = message
        return Verdict(mutant.kind, mutant.what, caught, difference)

    def _step(self, program: Program, schedule: Schedule) -> tuple[str, float]:
        """Return why the step is refused, and how far it is from the unbroken one as launched."""
        try:
            if self.stepped is not None:  # it has no such block: its step is as it was
                return "", _distance(self._run(program, schedule), self.launched)
            step = self._run(exact(program) if self._is_rounded else program, schedule)
            found = compare(step, self.expected)
            if wrong := found.describe(TOLERANCE):
                message = f"not equal to the single-device model: {wrong}"
                return message, _distance(step, self.launched)
            if self._is_rounded:
                step = self._run(program, schedule)
        except Exception as error:
            return "" if self.stepped else _words(error), float("inf")
        return "", _distance(step, self.launched)

    @property
    def _is_rounded(self) -> bool:
        return self.program.plan.dtype is not None

    def _run(self, program: Program, schedule: Schedule) -> Step:
        return emulate(lower(program), schedule, self.model, [self.batch])[0]


def judge_all(trial: Trial, *, limit: int | None = None) -> Iterator[Verdict]:
    """Yield the verdict on each mutant, at most `limit` of a kind."""
    outside = {region.name for region in trial.stepped.regions} if trial.stepped else ()
    yield from map(trial.judge, program_mutants(trial.program, limit=limit, outside=outside))
    if trial.schedule.num_ranks > 1 and trial.stepped is None:
        yield from map(trial.judge, schedule_mutants(trial.schedule, limit=limit))


def _check_structure(program: Program) -> None:
    check_structure(program)
    check_values(program)
    lower(program)


def _refusal(check: Callable[[], None]) -> str | None:
    """Return the message of the error that `check` raises, None if it raises none."""
    try:
        check()
    except Exception as error:
        return _words(error)
    return None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _distance(step: Step, other: Step) -> float:
    found = compare(step, other)
    return max(found.loss, found.max_gradient, found.max_weight)

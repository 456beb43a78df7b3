"""What a rank holds at once when it runs its list, for bytes per stage and micro-batch.

It follows from the order of a list alone, not from how long its actions take.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ilm_compile.schedule.actions import Action, Kind
from ilm_compile.schedule.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bytes of one micro-batch in a stage, or in a part of one.

    forward, backward, weight: the most at once while they run, what stays after them included.
    kept: between forward and backward. left: between backward and weight part.
    """

    forward: float = 0.0
    kept: float = 0.0
    backward: float = 0.0
    left: float = 0.0
    weight: float = 0.0

    def during(self, kind: Kind) -> float:
        """The most while an action of this kind runs."""
        return {Kind.F: self.forward, Kind.B: self.backward, Kind.W: self.weight}[kind]

    @classmethod
    def together(cls, parts: Iterable[Held]) -> Held:
        """Return what consecutive parts hold that run as one: backward the last of them first."""
        parts = list(parts)
        kept = left = forward = backward = weight = 0.0
        later = sum(part.left for part in parts)
        for part in parts:
            later -= part.left
            forward = max(forward, kept + part.forward)
            backward = max(backward, kept + part.backward + later)
            weight = max(weight, left + part.weight)
            kept, left = kept + part.kept, left + part.left
        return cls(forward=forward, kept=kept, backward=backward, left=left, weight=weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """While an action runs: how many other micro-batches of each of a rank's stages are alive.

    alive: between forward and backward; waiting: for their weight part; both by the place of the
    stage in `RankMoments.stages`, as is `running`.
    """

    alive: tuple[int, ...]
    waiting: tuple[int, ...]
    running: int
    kind: Kind

    def count(self, place: int) -> int:
        """How many micro-batches have what a stage keeps, the one that runs among them."""
        return self.alive[place] + (self.running == place and self.kind is not Kind.W)


@dataclass(frozen=True, slots=True)
class RankMoments:
    """The moments of one rank that may be its peak: no other has as much of everything."""

    stages: tuple[int, ...]
    moments: tuple[Moment, ...]

    def peak(self, held: Sequence[Held]) -> tuple[float, Moment]:
        """Return the most bytes held at once, and when. held: by each stage of the job."""
        own = [held[stage] for stage in self.stages]
        return max(((_bytes(m, own), m) for m in self.moments), key=lambda found: found[0])


def rank_moments(schedule: Schedule) -> list[RankMoments]:
    """Return the moments of every rank."""
    found = []
    for rank, row in enumerate(schedule.actions):
        stages = tuple(s for s, r in enumerate(schedule.stage_to_rank) if r == rank)
        seen = dict.fromkeys(moment for _, moment in _moments(row, stages, schedule))
        found.append(RankMoments(stages, tuple(m for m in seen if not _is_below(m, seen))))
    return found


def bytes_held(
    schedule: Schedule, rank: int, held: Sequence[Held]
) -> Iterator[tuple[Action, float, float]]:
    """Yield each compute of a rank with the most bytes while it runs, and those after it."""
    stages = tuple(s for s, r in enumerate(schedule.stage_to_rank) if r == rank)
    own = [held[stage] for stage in stages]
    frees = schedule.frees
    for action, moment in _moments(schedule.actions[rank], stages, schedule):
        most, one = _bytes(moment, own), own[moment.running]
        stays = {Kind.F: one.kept, Kind.B: one.left}.get(action.kind, 0.0)
        after = 0.0 if action.kind is frees else stays
        yield action, most, most - one.during(action.kind) + after


def _moments(
    row: Sequence[Action], stages: Sequence[int], schedule: Schedule
) -> Iterator[tuple[Action, Moment]]:
    alive, waiting = [0] * len(stages), [0] * len(stages)
    is_split = schedule.splits_backwards
    for action in row:
        if action.stage not in stages or not action.is_compute:
            continue
        place = stages.index(action.stage)
        alive[place] -= action.kind is Kind.B
        waiting[place] -= action.kind is Kind.W
        yield (
            action,
            Moment(alive=tuple(alive), waiting=tuple(waiting), running=place, kind=action.kind),
        )
        alive[place] += action.kind is Kind.F
        waiting[place] += action.kind is Kind.B and is_split


def _bytes(moment: Moment, own: Sequence[Held]) -> float:
    others = zip(moment.alive, moment.waiting, own, strict=True)
    total = sum(alive * each.kept + waiting * each.left for alive, waiting, each in others)
    return total + own[moment.running].during(moment.kind)


def _is_below(moment: Moment, others: Iterable[Moment]) -> bool:
    return any(
        other != moment
        and (other.running, other.kind) == (moment.running, moment.kind)
        and all(a <= b for a, b in zip(moment.alive, other.alive, strict=True))
        and all(a <= b for a, b in zip(moment.waiting, other.waiting, strict=True))
        for other in others
    )

"""Where a model is cut into stages and what it recomputes, chosen together.

A stage must fit into its rank's memory, and the first stages hold more micro-batches than the last:
what is recomputed there makes them slower, so they should have less to do. Cuts are moved as long
as the simulated step gets shorter; for each place of the cuts every rank recomputes as little as
makes it fit, blocks in part or whole, first what frees the most bytes per second. (The same
question is asked by AdaPipe, Sun et al. 2024, and answered there for a 1F1B pipeline by dynamic
programming.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from ilm_compile.rewrite.balance import balance
from ilm_compile.schedule import Schedule, StageTimes, simulate
from ilm_compile.schedule.memory import Held, Moment, RankMoments, rank_moments

_BETTER = 1 - 1e-9  # of a step time, so that rounding moves no cut


NOTHING, IN_PART, WHOLE = "nothing", "in part", "whole"
Ways = Mapping[int, str]  # of regions; of those that are not there, NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """What is computed again, in seconds, and what is held then."""

    held: Held
    again: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a unit has of one region; seconds and bytes are of one micro-batch on one rank.

    ways: what it may do, the first being that it computes nothing again.
    """

    region: int
    forward: float
    backward: float
    weight: float
    ways: Mapping[str, Way]

    @property
    def can_recompute(self) -> bool:
        """Whether it has a choice."""
        return len(self.ways) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """What lies between two places where a stage may begin.

    static: bytes that are held all the time; sent: seconds that a message from its end takes.
    """

    parts: tuple[Part, ...]
    static: float
    sent: float

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return sum(part.forward + part.backward + part.weight for part in self.parts)

    @property
    def repeatable(self) -> float:
        """The forward of what can be recomputed."""
        return sum(part.forward for part in self.parts if part.can_recompute)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    """cuts: the units at which the 2nd, 3rd, ... stage begins; ways: of the regions.

    seconds: of the simulated step. peaks: bytes of each rank. too_much: bytes by which the fullest
    rank does not fit, all that can be recomputed.
    """

    cuts: tuple[int, ...]
    ways: Ways
    seconds: float
    peaks: tuple[float, ...]
    too_much: float = 0.0

    @property
    def recomputed(self) -> frozenset[int]:
        """The regions of which something is computed again."""
        return frozenset(self.ways)

    @property
    def order(self) -> tuple[float, float, tuple[int, ...]]:
        """The better, the smaller."""
        return (self.too_much, self.seconds, self.cuts)


class Chooser:
    """Chooses for `units` under one schedule and so many bytes per rank.

    make_schedule: the schedule with a number of micro-batches; `num_microbatches` are run. Of more
    than a pipeline needs to be full, the rest is added at the pace of the busiest rank.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        make_schedule: Callable[[int], Schedule],
        *,
        num_microbatches: int,
        memory: float,
    ) -> None:
        self.units, self.memory = units, memory
        whole = make_schedule(1)
        enough = 3 * whole.num_stages
        enough += -enough % whole.num_ranks
        self.simulated = min(num_microbatches, enough)
        self.rest = num_microbatches - self.simulated
        self.schedule = make_schedule(self.simulated)
        self.ranks = rank_moments(self.schedule)
        self._seen: dict[tuple[int, ...], StageChoice] = {}

    def within(self, memory: float) -> Chooser:
        """Return one for other bytes per rank."""
        other = copy(self)
        other.memory, other._seen = memory, {}
        return other

    def best(self) -> StageChoice:
        """Return the best choice found from balanced stages on, by moving runs of cuts."""
        plain = [unit.seconds for unit in self.units]
        repeated = [unit.seconds + unit.repeatable for unit in self.units]
        stages = self.schedule.num_stages
        starts = {tuple(balance(costs, stages)) for costs in (plain, repeated)}
        starts |= {tuple(balance([u.static or 1e-9 for u in self.units], stages))}
        found = min(map(self.at, sorted(starts)), key=lambda choice: choice.order)
        while True:
            near = min(map(self.at, self._near(found.cuts)), key=lambda choice: choice.order)
            if not _is_better(near, found):
                return found
            found = near

    def at(self, cuts: tuple[int, ...]) -> StageChoice:
        """Return what is best to recompute with stages that begin at these units."""
        if cuts not in self._seen:
            self._seen[cuts] = self._fitted(cuts)
        return self._seen[cuts]

    def with_ways(self, cuts: tuple[int, ...], ways: Ways) -> StageChoice:
        """Return what a choice made elsewhere comes to."""
        spans = self._spans(cuts)
        peaks = tuple(self._peak(rank, spans, ways)[0] for rank in self.ranks)
        times = [self._times(span, ways) for span in spans]
        result = simulate(self.schedule, times)
        return StageChoice(
            cuts=cuts,
            ways=ways,
            seconds=result.cost + self.rest * max(result.busy) / self.simulated,
            peaks=peaks,
            too_much=max(0.0, *(peak - self.memory for peak in peaks)),
        )

    def _near(self, cuts: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the cuts with a run of them moved by one unit either way."""
        found = []
        for first in range(len(cuts)):
            for last in range(first + 1, len(cuts) + 1):
                for step in (-1, 1):
                    moved = (*cuts[:first], *(c + step for c in cuts[first:last]), *cuts[last:])
                    edges = (0, *moved, len(self.units))
                    if all(a < b for a, b in pairwise(edges)):
                        found.append(moved)
        return found or [cuts]

    def _fitted(self, cuts: tuple[int, ...]) -> StageChoice:
        spans = self._spans(cuts)
        ways: dict[int, str] = {}
        for rank in self.ranks:
            self._fit(rank, spans, ways)
        return self.with_ways(cuts, ways)

    def _fit(self, rank: RankMoments, spans: Sequence[range], ways: dict[int, str]) -> None:
        """Add to `ways` what the regions of a rank must compute again as well."""
        while True:
            peak, moment = self._peak(rank, spans, ways)
            if peak <= self.memory:
                return
            gain: dict[tuple[int, str], float] = {}
            seconds: dict[tuple[int, str], float] = {}
            for place, stage in enumerate(rank.stages):
                for part in self._parts(spans[stage]):
                    now = part.ways[ways.get(part.region, NOTHING)]
                    for name, way in part.ways.items():
                        key = part.region, name
                        freed = moment.count(place) * (now.held.kept - way.held.kept)
                        gain[key] = gain.get(key, 0.0) + freed
                        seconds[key] = seconds.get(key, 0.0) + way.again - now.again
            worth = {
                k: gain[k] / seconds[k] if seconds[k] > 0 else inf for k in gain if gain[k] > 0
            }
            if not worth:
                return
            region, name = max(worth, key=lambda key: (worth[key], -key[0], key[1]))
            ways[region] = name

    def _peak(self, rank: RankMoments, spans: Sequence[range], ways: Ways) -> tuple[float, Moment]:
        held, static = [Held()] * len(spans), 0.0
        for stage in rank.stages:
            static += sum(self.units[i].static for i in spans[stage])
            parts = self._parts(spans[stage])
            held[stage] = Held.together(
                part.ways[ways.get(part.region, NOTHING)].held for part in parts
            )
        peak, moment = rank.peak(held)
        return static + peak, moment

    def _times(self, span: range, ways: Ways) -> StageTimes:
        parts = list(self._parts(span))
        again = sum(part.ways[ways.get(part.region, NOTHING)].again for part in parts)
        return StageTimes(
            forward=sum(part.forward for part in parts),
            backward=sum(part.backward for part in parts) + again,
            weight=sum(part.weight for part in parts),
            message=self.units[span[-1]].sent,
        )

    def _parts(self, span: range) -> Iterator[Part]:
        return (part for i in span for part in self.units[i].parts)

    def _spans(self, cuts: tuple[int, ...]) -> list[range]:
        return [range(a, b) for a, b in pairwise((0, *cuts, len(self.units)))]


def _is_better(one: StageChoice, other: StageChoice) -> bool:
    if one.too_much != other.too_much:
        return one.too_much < other.too_much
    return one.seconds < other.seconds * _BETTER

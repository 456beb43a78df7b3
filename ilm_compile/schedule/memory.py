"""What a rank holds at once when it runs its list, for bytes per stage and micro-batch.

It follows from the order of a list alone, not from how long its actions take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ilm_compile.schedule.actions import Kind
from ilm_compile.schedule.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """How many micro-batches of each of a rank's stages are alive, while `running` runs."""

    alive: tuple[int, ...]  # by the place of the stage in `RankMoments.stages`
    running: int  # a place too


@dataclass(frozen=True, slots=True)
class RankMoments:
    """The moments of one rank that may be its peak: no other has as much of everything."""

    stages: tuple[int, ...]
    moments: tuple[Moment, ...]

    def peak(self, kept: Sequence[float], working: Sequence[float]) -> tuple[float, Moment]:
        """Return the most bytes held at once, and when.

        For each stage of the job: kept, what a micro-batch leaves between its forward and its
        backward; working, what is alive beside it while its backward runs.
        """
        return max(
            (
                (
                    sum(n * kept[s] for n, s in zip(m.alive, self.stages, strict=True))
                    + working[self.stages[m.running]],
                    m,
                )
                for m in self.moments
            ),
            key=lambda found: found[0],
        )


def rank_moments(schedule: Schedule) -> list[RankMoments]:
    """Return the moments of every rank.

    A forward makes what its backward frees, or the backward's weight part where it is split off.
    """
    frees = Kind.W if schedule.splits_backwards else Kind.B
    found = []
    for rank, row in enumerate(schedule.actions):
        stages = tuple(s for s, r in enumerate(schedule.stage_to_rank) if r == rank)
        alive = [0] * len(stages)
        seen: dict[Moment, None] = {}
        for action in row:
            if action.stage not in stages or not action.is_compute:
                continue
            place = stages.index(action.stage)
            alive[place] += action.kind is Kind.F
            seen[Moment(alive=tuple(alive), running=place)] = None
            alive[place] -= action.kind is frees
        found.append(RankMoments(stages, tuple(m for m in seen if not _is_below(m, seen))))
    return found


def _is_below(moment: Moment, others: dict[Moment, None]) -> bool:
    return any(
        other != moment
        and other.running == moment.running
        and all(a <= b for a, b in zip(moment.alive, other.alive, strict=True))
        for other in others
    )

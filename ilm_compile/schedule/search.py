"""A schedule found for given times: greedy lists, and the named schedules, compared in simulation.

A greedy list is made in the order of time: a rank that is free runs a backward that is ready, or
else a forward, or else a weight part, each if nothing better is about to come. That is the
heuristic of the Zero Bubble paper (Qi et al., 2023, arXiv 2401.10241, section 3), tried with a few
policies. Some take the forwards and backwards of a named schedule and place its weight parts anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule.actions import Action, Kind
from ilm_compile.schedule.builders import build, known_schedules, looped
from ilm_compile.schedule.check import check
from ilm_compile.schedule.comms import insert_comms
from ilm_compile.schedule.schedule import Schedule, peak_in_flight
from ilm_compile.schedule.simulate import StageTimes, simulate
from ilm_compile.schedule.vee import down_and_up


def search(
    times: Sequence[StageTimes],
    *,
    pp: int,
    num_microbatches: int,
    max_in_flight: int | None = None,
) -> Schedule:
    """Return the schedule of the smallest simulated makespan, the same whenever it is asked for.

    times: of each stage; a rank has len(times) / pp of them. max_in_flight: how many micro-batches
    of its stages a rank may hold at once, as `peak_in_flight` counts; None for no limit. No named
    schedule that keeps to the limit is faster. Raises `ScheduleError` for counts that do not fit
    and a limit below the stages of a rank.
    """
    num_chunks, rest = divmod(len(times), pp)
    if rest or not num_chunks or num_microbatches < 1:
        raise ScheduleError(
            f"search: expected the times of a multiple of pp={pp} stages and at least one "
            f"micro-batch, got {len(times)} stages and num_microbatches={num_microbatches}"
        )
    limit = num_chunks * num_microbatches if max_in_flight is None else max_in_flight
    if limit < num_chunks:
        raise ScheduleError(
            f"search: max_in_flight={limit} leaves no room for one micro-batch in each of the "
            f"{num_chunks} stages of a rank; give at least {num_chunks}"
        )
    named = [
        schedule
        for schedule in _named(pp=pp, num_microbatches=num_microbatches, num_chunks=num_chunks)
        if max(peak_in_flight(schedule)) <= limit
    ]
    policies = [*_policies(len(times), pp, limit), *_policies_like(named, limit)]
    made = (_Lists(times, pp, num_microbatches, policy).make() for policy in policies)
    found = [*named, *(insert_comms(Schedule.from_rows("search", rows)) for rows in made)]
    return min(found, key=lambda schedule: simulate(schedule, times).makespan)


def _named(*, pp: int, num_microbatches: int, num_chunks: int) -> Iterator[Schedule]:
    for name in known_schedules():
        try:
            schedule = build(name, pp=pp, num_microbatches=num_microbatches, num_chunks=num_chunks)
            check(schedule)
        except ScheduleError:  # of other counts
            continue
        # A builder of a user's may have its own idea of them.
        if (schedule.num_stages, schedule.num_microbatches) == (pp * num_chunks, num_microbatches):
            yield schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class _Policy:
    """ranks: of the stages. limit: of micro-batches in flight.

    weight_patience, forward_patience: a weight part, or a forward, begins only if nothing better,
    or no backward, is known to come within this part of its time. lead: for how many more forwards
    than backwards a rank may have done, for each rank that follows. order: of forwards and
    backwards, by rank; None: as it comes.
    """

    ranks: tuple[int, ...]
    limit: int
    weight_patience: float
    forward_patience: float = 0.0
    lead: float = inf
    order: tuple[tuple[Action, ...], ...] | None = None


def _policies(num_stages: int, pp: int, limit: int) -> Iterator[_Policy]:
    num_chunks = num_stages // pp
    for place, lead, weight, forward in product(
        (looped, down_and_up) if num_chunks == 2 else (looped,),
        (1, 2, inf) if num_chunks == 1 else (inf,),
        (0.0, 0.5, 1.0),
        (0.0, 0.5, 1.0),
    ):
        yield _Policy(
            ranks=tuple(place(stage, pp) for stage in range(num_stages)),
            limit=limit,
            lead=lead,
            weight_patience=weight,
            forward_patience=forward,
        )


def _policies_like(named: Sequence[Schedule], limit: int) -> Iterator[_Policy]:
    for schedule, patience in product(named, (0.0, 0.5, 1.0)):
        yield _Policy(
            ranks=schedule.stage_to_rank,
            limit=limit,
            weight_patience=patience,
            order=tuple(
                tuple(action for action in row if action.kind in (Kind.F, Kind.B))
                for row in schedule.actions
            ),
        )


_Offer = tuple[float, tuple[int, int], Action]


class _Lists:
    """The lists of all ranks as they are made."""

    def __init__(
        self, times: Sequence[StageTimes], pp: int, num_microbatches: int, policy: _Policy
    ) -> None:
        self.times, self.policy, self.count = times, policy, num_microbatches
        self.rank_of = policy.ranks
        self.stages = [[s for s, r in enumerate(self.rank_of) if r == rank] for rank in range(pp)]
        self.rows: list[list[Action]] = [[] for _ in range(pp)]
        self.free = [0.0] * pp
        self.alive = [0] * pp
        self.done = [0] * pp  # forwards and backwards
        self.owed: list[deque[Action]] = [deque() for _ in range(pp)]
        self.next = {(s, k): 0 for s in range(len(times)) for k in (Kind.F, Kind.B)}
        self.ends: dict[Action, float] = {}

    def make(self) -> list[list[Action]]:
        """Return the lists: always the earliest action that a rank can run comes next."""
        ranks = range(len(self.rows))
        while True:
            offers = [(offer, rank) for rank in ranks if (offer := self._offer(rank)) is not None]
            if not offers:
                return self.rows
            (start, _, action), rank = min(offers, key=lambda each: (each[0][:2], each[1]))
            self._run(rank, action, start)

    def _offer(self, rank: int) -> _Offer | None:
        """What the rank would run next: its start, its priority and the action."""
        offers = [
            (max(self.free[rank], ready), self._priority(action), action)
            for action in self._next(rank)
            if (ready := self._ready(action)) < inf
        ]
        backward = min((start for start, _, a in offers if a.kind is Kind.B), default=inf)
        offers = [
            (start, priority, action)
            for start, priority, action in offers
            if start >= backward or start + self._patience(action) <= backward
        ]
        best = min(offers, key=lambda offer: offer[:2], default=None)
        if self.owed[rank]:
            part = self.owed[rank][0]
            if best is None or best[0] > self.free[rank] + self._patience(part):
                return self.free[rank], (2, 0), part
        return best

    def _next(self, rank: int) -> Iterator[Action]:
        """Yield the forwards and backwards that the rank may run next, ready or not."""
        if self.policy.order is not None:
            position = self.done[rank]
            for action in self.policy.order[rank][position : position + 1]:
                if action.kind is Kind.B or self.alive[rank] < self.policy.limit:
                    yield action
            return
        for stage in self.stages[rank]:
            forward, backward = (self.next[stage, kind] for kind in (Kind.F, Kind.B))
            # Each later stage of the rank has one place of its own, so that what has begun can end.
            later = sum(other > stage for other in self.stages[rank])
            ahead = (
                self.policy.lead * (len(self.rows) - 1 - rank) if self.policy.lead < inf else inf
            )
            if (
                forward < self.count
                and self.alive[rank] + later < self.policy.limit
                and forward - backward <= ahead
            ):
                yield Action(stage, Kind.F, forward)
            if backward < self.count:
                yield Action(stage, Kind.B, backward)

    def _patience(self, action: Action) -> float:
        times, policy = self.times[action.stage], self.policy
        if action.kind is Kind.W:
            return policy.weight_patience * times.weight
        return policy.forward_patience * times.forward

    def _ready(self, action: Action) -> float:
        """When its input is there, as far as that is known."""
        stage, last = action.stage, len(self.times) - 1
        if action.kind is Kind.B and Action(stage, Kind.F, action.microbatch) not in self.ends:
            return inf
        step = -1 if action.kind is Kind.F else +1
        if not 0 <= stage + step <= last:
            return 0.0 if stage + step < 0 else self.ends[Action(stage, Kind.F, action.microbatch)]
        source = Action(stage + step, action.kind, action.microbatch)
        if source not in self.ends:
            return inf
        is_sent = self.rank_of[source.stage] != self.rank_of[stage]
        return self.ends[source] + (self.times[source.stage].message if is_sent else 0.0)

    def _priority(self, action: Action) -> tuple[int, int]:
        return int(action.kind is Kind.F), -action.stage

    def _run(self, rank: int, action: Action, start: float) -> None:
        times = self.times[action.stage]
        took = {Kind.F: times.forward, Kind.B: times.backward, Kind.W: times.weight}[action.kind]
        self.ends[action] = self.free[rank] = start + took
        self.rows[rank].append(action)
        if action.kind is Kind.W:
            self.owed[rank].popleft()
            self.alive[rank] -= 1
            return
        self.next[action.stage, action.kind] += 1
        self.done[rank] += 1
        if action.kind is Kind.F:
            self.alive[rank] += 1
        else:
            self.owed[rank].append(Action(action.stage, Kind.W, action.microbatch))

"""When every action of a schedule runs, by discrete events over its lists, without running it.

A rank does its list in order and one compute at a time. A compute also waits for its message.

Where sending overlaps computing, a message leaves when its send is reached, takes its time beside
everything else, and holds neither rank; messages do not slow each other down. These are the rules
of the Zero Bubble paper (Qi et al., 2023, arXiv 2401.10241). Where it does not, a send holds its
rank from the moment the other rank has posted the receive until the message is there, as `check`
takes sends to do.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, islice
from typing import NamedTuple

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule.actions import Action, Kind
from ilm_compile.schedule.check import check
from ilm_compile.schedule.schedule import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """What one micro-batch takes in one stage, all in the same unit of time.

    backward: for the gradient of the input; weight: for those of the weights. A schedule that does
    not split its backwards takes their sum for each, so that weight may stay 0 if only that is
    known. message: from this stage to the next one or to the one before.
    """

    forward: float
    backward: float
    weight: float = 0.0
    message: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            time = getattr(self, field.name)
            if not (math.isfinite(time) and time >= 0):
                raise ScheduleError(
                    f"the {field.name} time of a stage must be a finite number of at least 0, "
                    f"got {time}"
                )


class Span(NamedTuple):
    """From when to when. That of a receive ends when its message is there."""

    start: float
    stop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """The spans of all actions; the ranks start at 0 or when their first message is there."""

    schedule: Schedule
    spans: dict[Action, Span]

    @property
    def makespan(self) -> float:
        """The time at which the last rank ends."""
        return max((span.stop for span in self.spans.values()), default=0.0)

    @property
    def busy(self) -> tuple[float, ...]:
        """For each rank, the time in which it computes."""
        return tuple(
            math.fsum(self.spans[a].stop - self.spans[a].start for a in row)
            for row in self._computes
        )

    @property
    def rank_times(self) -> tuple[float, ...]:
        """For each rank, the time from its first compute to the end of its last."""
        return tuple(
            self.spans[row[-1]].stop - self.spans[row[0]].start if row else 0.0
            for row in self._computes
        )

    @property
    def cost(self) -> float:
        """The longest rank's time: the step time of ranks that need not start together.

        Less than the makespan only if the rank that ends last has also begun late, as in `zb_h2`.
        """
        return max(self.rank_times, default=0.0)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """For each rank, the share of `cost` in which it does not compute."""
        return tuple(1 - busy / self.cost if self.cost else 0.0 for busy in self.busy)

    def in_flight(self, rank: int) -> list[tuple[float, int]]:
        """How many forwards of the rank wait for their backward, from which time on.

        The unit is that of `peak_in_flight`, which is the highest of these numbers.
        """
        frees = self.schedule.frees
        events = [
            (self.spans[a].start, 1) if a.kind is Kind.F else (self.spans[a].stop, -1)
            for a in self._computes[rank]
            if a.kind in (Kind.F, frees)
        ]
        counts = accumulate(change for _, change in events)
        return list(zip((time for time, _ in events), counts, strict=True))

    @property
    def _computes(self) -> tuple[tuple[Action, ...], ...]:
        return self.schedule.compute_only().actions


def simulate(
    schedule: Schedule, times: Sequence[StageTimes], *, overlap: bool = True
) -> Simulation:
    """Run the lists of `schedule` in simulated time.

    times: one for each stage. overlap: whether sending runs beside computing.
    Raises ScheduleError for a schedule that does not pass `check`, whose lists would not end.
    """
    check(schedule)
    if len(times) != schedule.num_stages:
        raise ScheduleError(
            f"schedule {schedule.name!r} has {schedule.num_stages} stages, got the times of "
            f"{len(times)}; give one StageTimes for each stage"
        )
    return Simulation(schedule=schedule, spans=_run(schedule, times, overlap))


def in_order(
    schedule: Schedule, needed: Callable[[Action], Action | None]
) -> Iterator[tuple[int, Action, Action | None]]:
    """Yield the rank of each action, itself and what it needs, in an order in which that is first.

    needed: what of another rank or stage an action needs beside those before it in its own list.
    """
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    # An action that has not happened yet, and the rank that stands still until it does.
    waiting: dict[Action, int] = {}
    ready = deque(range(schedule.num_ranks))
    while ready:
        rank = ready.popleft()
        for action in islice(schedule.actions[rank], position[rank], None):
            other = needed(action)
            if other is not None and other not in done:
                waiting[other] = rank
                break
            yield rank, action, other
            done.add(action)
            position[rank] += 1
            if action in waiting:
                ready.append(waiting.pop(action))


def _run(schedule: Schedule, times: Sequence[StageTimes], overlap: bool) -> dict[Action, Span]:
    spans: dict[Action, Span] = {}
    durations = _durations(schedule, times)
    free = [0.0] * schedule.num_ranks
    for rank, action, needed in in_order(schedule, lambda a: _needed(schedule, a, overlap)):
        start = free[rank]
        if needed is not None:
            # A posted receive is all that a send waits for, a message must have arrived.
            other = spans[needed]
            start = max(start, other.start if action.is_send else other.stop)
        spans[action] = Span(start, start + durations[action.kind][action.stage])
        if action.is_compute or (action.is_send and not overlap):
            free[rank] = spans[action].stop
    for action, span in spans.items():
        if action.is_recv:
            spans[action] = Span(span.start, max(span.start, spans[action.partner].stop))
    return spans


def _needed(schedule: Schedule, action: Action, overlap: bool) -> Action | None:
    """What must have happened on another rank before the action can start."""
    if action.is_compute:
        receives = schedule.receives(action)
        return receives[0].partner if receives else None
    return action.partner if action.is_send and not overlap else None


def _durations(schedule: Schedule, times: Sequence[StageTimes]) -> dict[Kind, list[float]]:
    """For each kind, how long it takes in each stage."""
    is_split = schedule.splits_backwards
    return {
        Kind.F: [t.forward for t in times],
        Kind.B: [t.backward if is_split else t.backward + t.weight for t in times],
        Kind.W: [t.weight for t in times],
        Kind.SEND_F: [t.message for t in times],
        Kind.SEND_B: [t.message for t in times],
        Kind.RECV_F: [0.0] * len(times),
        Kind.RECV_B: [0.0] * len(times),
    }

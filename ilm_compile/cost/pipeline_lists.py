"""The time of schedules that no formula describes, from their lists: of many pipelines at once.

`ilm_compile.schedule.simulate` for a search: the lists of a schedule are put in one order in which
every action follows what it needs, once, and walked with a row of times for each pipeline that
shares them. A pipeline that has been full for a while goes on at the same pace, so of many
micro-batches a part is walked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ilm_compile.cost.pipeline import Pipeline
from ilm_compile.schedule import Kind, Schedule, build
from ilm_compile.schedule.actions import Action
from ilm_compile.schedule.simulate import in_order

CHUNKS = 2  # of a rank, under each of them
FULL, LEAST = 4, 24  # times its ranks, and at least: the micro-batches after which a pipeline
# goes on at the same pace
InFlight = tuple[float, float]  # micro-batches of a rank: alive, and waiting for their weight part
_Seconds = NDArray[np.float64]


class _Step(NamedTuple):
    """An action; needs: the place of one of another stage, or -1; sent: whether by a message."""

    rank: int
    kind: Kind
    stage: int
    needs: int
    sent: bool


class _Lists(NamedTuple):
    ranks: tuple[int, ...]  # of the stages
    steps: tuple[_Step, ...]
    in_flight: tuple[tuple[InFlight, ...], ...]


def spans(schedule: str, pipelines: Sequence[Pipeline]) -> list[float]:
    """Return the seconds of pipelines of one number of ranks and micro-batches."""
    one = pipelines[0]
    count, full = round(one.num_microbatches), _full(one)
    if count <= full:
        return [float(each) for each in _walk(_lists(schedule, one.pp, count), pipelines)]
    short, long = (_walk(_lists(schedule, one.pp, n), pipelines) for n in (full - 2 * one.pp, full))
    return [float(each) for each in long + (count - full) * (long - short) / (2 * one.pp)]


def in_flight(schedule: str, pipeline: Pipeline) -> Sequence[Sequence[InFlight]]:
    """Return, for each rank, the pairs of micro-batches in flight that may be its peak."""
    count = min(round(pipeline.num_microbatches), _full(pipeline))
    return _lists(schedule, pipeline.pp, count).in_flight


def _full(pipeline: Pipeline) -> int:
    return max(LEAST, FULL * pipeline.pp)


def _walk(lists: _Lists, pipelines: Sequence[Pipeline]) -> _Seconds:
    seconds = _seconds(lists, pipelines)
    message = np.array([p.message for p in pipelines])
    num_ranks = max(lists.ranks) + 1
    free: list[_Seconds] = [np.zeros(len(pipelines))] * num_ranks
    begun: dict[int, _Seconds] = {}
    ends: list[_Seconds] = []
    for rank, kind, stage, needs, sent in lists.steps:
        start = free[rank]
        if needs >= 0:
            start = np.maximum(start, ends[needs] + message if sent else ends[needs])
        begun.setdefault(rank, start)
        end = start + seconds[kind][stage]
        ends.append(end)
        free[rank] = end
    most: _Seconds = np.max([free[rank] - begun[rank] for rank in begun], axis=0)
    return most


def _seconds(lists: _Lists, pipelines: Sequence[Pipeline]) -> dict[Kind, list[_Seconds]]:
    """What each kind takes in each stage; embedding and head are equal parts of the three."""
    last, is_split = len(lists.ranks) - 1, any(step.kind is Kind.W for step in lists.steps)
    found: dict[Kind, list[_Seconds]] = {Kind.F: [], Kind.B: [], Kind.W: []}
    for stage, rank in enumerate(lists.ranks):
        parts = []
        for p in pipelines:
            again = p.again[rank] if p.again else 0.0
            end = ((stage == 0) * p.first + (stage == last) * p.last) / 3
            each = (p.forward, p.backward + again, p.weight)
            forward, backward, weight = (max(0.0, t / CHUNKS + end) for t in each)
            parts.append((forward, backward + (0.0 if is_split else weight), weight))
        for kind, times in zip(found, np.array(parts).T, strict=True):
            found[kind].append(times)
    return found


@lru_cache(maxsize=256)
def _lists(schedule: str, pp: int, num_microbatches: int) -> _Lists:
    made = build(schedule, pp=pp, num_chunks=CHUNKS, num_microbatches=num_microbatches)
    made = made.compute_only()
    alive = tuple(tuple(_in_flight(row, made.splits_backwards)) for row in made.actions)
    return _Lists(made.stage_to_rank, tuple(_ordered(made)), alive)


def _ordered(schedule: Schedule) -> list[_Step]:
    """The actions of all ranks in an order in which each follows what it needs."""
    place: dict[Action, int] = {}
    steps: list[_Step] = []
    for rank, action, needed in in_order(schedule, lambda a: _needed(a, schedule.num_stages)):
        other = rank if needed is None else schedule.stage_to_rank[needed.stage]
        needs = -1 if needed is None else place[needed]
        place[action] = len(steps)
        steps.append(_Step(rank, action.kind, action.stage, needs, other != rank))
    return steps


def _needed(action: Action, num_stages: int) -> Action | None:
    """What of another stage an action needs; of its own stage its rank's list has it before."""
    step = {Kind.F: -1, Kind.B: +1}.get(action.kind)
    if step is None or not 0 <= action.stage + step < num_stages:
        return None
    return Action(action.stage + step, action.kind, action.microbatch)


def _in_flight(row: Sequence[Action], is_split: bool) -> list[InFlight]:
    alive = waiting = 0
    seen: set[tuple[int, int]] = set()
    for action in row:
        alive += action.kind is Kind.F
        seen.add((alive, waiting))
        alive -= action.kind is Kind.B
        waiting += (action.kind is Kind.B and is_split) - (action.kind is Kind.W)
    most = [
        one
        for one in sorted(seen)
        if not any(two != one and two[0] >= one[0] and two[1] >= one[1] for two in seen)
    ]
    return [(a / CHUNKS, w / CHUNKS) for a, w in most]

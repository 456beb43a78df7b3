"""Faults of pipeline schedules, as edits: what a hand-written or edited schedule gets wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from ilm_compile.schedule import Action, Kind, Schedule

Place = tuple[str, Schedule]  # words about it, and the wrong schedule
Row = tuple[Action, ...]


def _with_row(schedule: Schedule, rank: int, row: Sequence[Action]) -> Schedule:
    rows = list(schedule.actions)
    rows[rank] = tuple(row)
    return replace(schedule, actions=tuple(rows))


def _relabelled(row: Row, first: int, second: int) -> Row:
    other = {first: second, second: first}
    return tuple(a._replace(microbatch=other.get(a.microbatch, a.microbatch)) for a in row)


def _swapped(row: Row, first: Action, second: Action) -> Row:
    other = {first: second, second: first}
    return tuple(other.get(action, action) for action in row)


def swap_micro_batches(schedule: Schedule) -> Iterator[Place]:
    """On one rank two micro-batches change places: computes alone, or with their messages."""
    for rank, row in enumerate(schedule.actions):
        for first, second in pairwise(range(schedule.num_microbatches)):
            words = f"{first} and {second} on rank {rank}"
            yield (
                f"{words}, messages too",
                _with_row(schedule, rank, _relabelled(row, first, second)),
            )
            for kind in (Kind.F, Kind.B):
                stage = next(a.stage for a in row if a.kind is kind)
                ends = (Action(stage, kind, first), Action(stage, kind, second))
                yield (
                    f"{words}, {ends[0]} and {ends[1]} only",
                    _with_row(schedule, rank, _swapped(row, *ends)),
                )


def rename_micro_batches(schedule: Schedule) -> Iterator[Place]:
    """Two micro-batches change places on every rank."""
    for first, second in pairwise(range(schedule.num_microbatches)):
        rows = tuple(_relabelled(row, first, second) for row in schedule.actions)
        yield f"{first} and {second} on every rank", replace(schedule, actions=rows)


def drop_action(schedule: Schedule, wanted: Callable[[Action], bool]) -> Iterator[Place]:
    """One end of a message, or a compute, is missing."""
    for rank, row in enumerate(schedule.actions):
        for position, action in enumerate(row):
            if wanted(action):
                yield (
                    f"{action} on rank {rank}",
                    _with_row(schedule, rank, (*row[:position], *row[position + 1 :])),
                )


def drop_message(schedule: Schedule) -> Iterator[Place]:
    """Both ends of a message are missing."""
    for row in schedule.actions:
        for send in row:
            if send.is_send:
                rows = (
                    tuple(a for a in r if a not in (send, send.partner)) for r in schedule.actions
                )
                yield f"{send} and {send.partner}", replace(schedule, actions=tuple(rows))


def reorder(schedule: Schedule, wanted: Callable[[Action], bool]) -> Iterator[Place]:
    """An action one place earlier, one place later, or last."""
    for rank, row in enumerate(schedule.actions):
        for position, action in enumerate(row):
            if not wanted(action):
                continue
            rest = [*row[:position], *row[position + 1 :]]
            for words, target in (("earlier", position - 1), ("later", position + 1), ("last", -1)):
                place = len(rest) if target == -1 and words == "last" else target
                moved = [*rest[:place], action, *rest[place:]]
                if place >= 0 and tuple(moved) != row:
                    yield f"{action} on rank {rank} {words}", _with_row(schedule, rank, moved)


def late_receives(schedule: Schedule) -> Iterator[Place]:
    """Receives posted only just before the compute that needs them, on one rank or on all.

    Where sends block until they are received, two ranks may then wait for each other for ever.
    """
    rows = []
    for row in schedule.actions:
        late: list[Action] = []
        for action in row:
            if not action.is_recv:
                late += [*schedule.receives(action), action]
        rows.append(tuple(late))
    for rank, row in enumerate(rows):
        if row != schedule.actions[rank]:
            yield f"all receives of rank {rank}", _with_row(schedule, rank, row)
    yield "all receives of all ranks", replace(schedule, actions=tuple(rows))


def swap_messages(schedule: Schedule) -> Iterator[Place]:
    """At one end two messages of one kind change places: tensors are swapped without an error."""
    for rank, row in enumerate(schedule.actions):
        for kind in (Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B):
            same = [action for action in row if action.kind is kind]
            for first, second in pairwise(same):
                yield (
                    f"{first} and {second} on rank {rank}",
                    _with_row(schedule, rank, _swapped(row, first, second)),
                )


def duplicate(schedule: Schedule) -> Iterator[Place]:
    """An action runs twice in a row."""
    for rank, row in enumerate(schedule.actions):
        for position, action in enumerate(row):
            twice = (*row[: position + 1], *row[position:])
            yield f"{action} on rank {rank}", _with_row(schedule, rank, twice)


def exchanged(schedule: Schedule, first: Kind, second: Kind) -> Iterator[Place]:
    """Two kinds of action of a micro-batch in the other order."""
    for rank, row in enumerate(schedule.actions):
        for action in row:
            other = action._replace(kind=second)
            if action.kind is first and other in row:
                yield (
                    f"{other} before {action} on rank {rank}",
                    _with_row(schedule, rank, _swapped(row, action, other)),
                )


KINDS: dict[str, Callable[[Schedule], Iterator[Place]]] = {
    "swap two micro-batches": swap_micro_batches,
    "rename two micro-batches": rename_micro_batches,
    "drop a send": lambda s: drop_action(s, lambda a: a.is_send),
    "drop a receive": lambda s: drop_action(s, lambda a: a.is_recv),
    "drop a message": drop_message,
    "drop a compute": lambda s: drop_action(s, lambda a: a.is_compute),
    "reorder a send": lambda s: reorder(s, lambda a: a.is_send),
    "reorder a receive": lambda s: reorder(s, lambda a: a.is_recv),
    "post receives late": late_receives,
    "swap messages at one end": swap_messages,
    "duplicate an action": duplicate,
    "backward before forward": lambda s: exchanged(s, Kind.F, Kind.B),
    "weight part before backward": lambda s: exchanged(s, Kind.B, Kind.W),
}

"""The proof that a schedule runs to its end and computes the right thing.

Sends are taken to block until they are received, as gloo's and NCCL's do: a send holds its rank
until the other rank has posted the matching receive; a receive is only posted, and the compute
that needs it waits until the message was sent. Messages between two ranks are matched by their
order alone, as NCCL does, so an order that differs at the two ends would exchange tensors without
any error. Micro-batches may run in any order, unlike in torch's own executor, which pairs losses
with micro-batches only if the last stage runs them from first to last.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule.actions import Action, Kind, producers
from ilm_compile.schedule.schedule import Schedule

_EXCERPT = 4  # actions shown on either side of the marked one


def check(schedule: Schedule) -> None:
    """Raise ScheduleError unless every rank can run its list and all computes are right.

    A schedule without any backward is held to be for inference.
    """
    _check_complete(schedule)
    _check_order_on_each_rank(schedule)
    _check_message_order(schedule)
    _check_no_cyclic_wait(schedule)


def _check_complete(schedule: Schedule) -> None:
    """Every compute and every message it needs is there once, on its rank, and nothing else."""
    expected = dict.fromkeys(_expected(schedule))
    seen: dict[Action, tuple[int, int]] = {}
    for rank, row in enumerate(schedule.actions):
        for position, action in enumerate(row):
            here = (rank, position)
            if action not in expected:
                _fail(schedule, f"{action} on rank {rank} has no use here; remove it", here)
            home = schedule.stage_to_rank[action.stage]
            if rank != home:
                stage = f"stage {action.stage} lives on rank {home}"
                _fail(schedule, f"{action} is on rank {rank} but {stage}; move it there", here)
            if action in seen:
                _fail(schedule, f"rank {rank} runs {action} twice; keep one", seen[action], here)
            seen[action] = here
    for action in expected:
        if action not in seen:
            text = f"rank {schedule.stage_to_rank[action.stage]} never runs {action}; add it"
            if action.is_compute or action.partner not in seen:
                _fail(schedule, text)
            _fail(schedule, f"{text}, the other end of {action.partner}", seen[action.partner])


def _expected(schedule: Schedule) -> list[Action]:
    kinds = {action.kind for row in schedule.actions for action in row if action.is_compute}
    # A weight part without its backward must not pass for inference.
    kinds |= {Kind.F} | ({Kind.B} if Kind.W in kinds else set())
    computes = [
        Action(stage, kind, microbatch)
        for kind in Kind
        if kind in kinds
        for stage in range(schedule.num_stages)
        for microbatch in range(schedule.num_microbatches)
    ]
    return [a for c in computes for a in (*schedule.receives(c), c, *schedule.sends(c))]


def _check_order_on_each_rank(schedule: Schedule) -> None:
    """What an action needs from its own rank comes before it."""
    for rank, row in enumerate(schedule.actions):
        position = {action: index for index, action in enumerate(row)}
        for action in row:
            for needed in _needed_on_rank(schedule, action):
                if position[needed] > position[action]:
                    _fail(
                        schedule,
                        f"rank {rank} runs {action} before {needed}, which it needs; "
                        f"move {needed} ahead",
                        (rank, position[action]),
                    )


def _needed_on_rank(schedule: Schedule, action: Action) -> list[Action]:
    if action.is_send:
        kind = Kind.F if action.kind is Kind.SEND_F else Kind.B
        return [Action(action.stage, kind, action.microbatch)]
    if action.is_recv:
        return []
    rank = schedule.stage_to_rank[action.stage]
    needed = producers(action, schedule.num_stages)
    local = [producer for producer in needed if schedule.stage_to_rank[producer.stage] == rank]
    return [*local, *schedule.receives(action)]


def _check_message_order(schedule: Schedule) -> None:
    """The two ends of each pair of ranks agree on the order of messages, in each direction."""
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for rank, row in enumerate(schedule.actions):
        for action in row:
            if action.is_send:
                sent.setdefault((rank, schedule.peer(action)), []).append(action)
            elif action.is_recv:
                received.setdefault((schedule.peer(action), rank), []).append(action)
    for (sender, receiver), sends in sent.items():
        for send, recv in zip(sends, received[sender, receiver], strict=True):
            if send.partner != recv:
                _fail(
                    schedule,
                    f"rank {sender} sends {send} to rank {receiver}, which expects {recv.partner} "
                    "at that point: the tensors would be swapped without an error; give both "
                    "ranks the same order",
                    (sender, schedule.actions[sender].index(send)),
                    (receiver, schedule.actions[receiver].index(recv)),
                )


@dataclass(frozen=True, slots=True)
class _Stop:
    """A rank that stands still: the position of its next action, and what that waits for."""

    rank: int
    position: int
    action: Action
    waits_for: Action


def _check_no_cyclic_wait(schedule: Schedule) -> None:
    """Run all ranks with blocking sends; when nothing moves any more, report who waits for whom."""
    stops = _run(schedule)
    if not stops:
        return
    # Every stopped rank waits for one other, which is stopped too: walking on ends in a cycle.
    path = [min(stops)]
    while path[-1] not in path[:-1]:
        path.append(schedule.stage_to_rank[stops[path[-1]].waits_for.stage])
    cycle = [stops[rank] for rank in path[path.index(path[-1]) :]]
    waits = [
        f"\n  rank {stop.rank} stops at {stop.action} until rank {other.rank} runs {stop.waits_for}"
        for stop, other in pairwise(cycle)
    ]
    marks = [(stop.rank, stop.position) for stop in cycle[:-1]]
    _fail(schedule, f"cyclic wait; post the receives earlier:{''.join(waits)}", *marks)


def _run(schedule: Schedule) -> dict[int, _Stop]:
    """The ranks that cannot reach the end of their list, with the place where they stop."""
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    while True:
        stops: dict[int, _Stop] = {}
        before = len(done)
        for rank, row in enumerate(schedule.actions):
            while position[rank] < len(row):
                action = row[position[rank]]
                waits_for = _waits_for(schedule, action)
                if waits_for is not None and waits_for not in done:
                    stops[rank] = _Stop(rank, position[rank], action, waits_for)
                    break
                done.add(action)
                position[rank] += 1
        if len(done) == before:
            return stops


def _waits_for(schedule: Schedule, action: Action) -> Action | None:
    """What must happen on another rank first: a receive for a send, a send for a compute."""
    if action.is_send:
        return action.partner
    receives = schedule.receives(action)
    return receives[0].partner if receives else None


def _fail(schedule: Schedule, text: str, *marks: tuple[int, int]) -> NoReturn:
    """Raise with the lists around each marked (rank, position)."""
    lines = [f"schedule {schedule.name!r}: {text}"]
    for rank, position in marks:
        row = schedule.actions[rank]
        start, stop = max(0, position - _EXCERPT), position + _EXCERPT + 1
        cells = [str(action) for action in row[start:stop]]
        cells[position - start] = f">>{cells[position - start]}<<"
        dots = ("... " if start > 0 else "", " ..." if stop < len(row) else "")
        lines.append(f"  rank {rank}: {dots[0]}{' '.join(cells)}{dots[1]}")
    raise ScheduleError("\n".join(lines))

"""Sends and receives for schedules that only say what is computed.

The computes are laid out in time (`timeline`), and every message takes place when its producer
ends: the sender's list and the receiver's list get their end of it at that moment. All lists
follow one order of events, so the earliest event that has not happened can always happen: nothing
hangs, whether sends block, receives block too, or all actions between two computes go out as one
batch; and both ends of a pair see their messages in the same order.

Posting each receive just before the compute that needs it would be simpler, and hangs interleaved
schedules: two ranks send each other a gradient that neither has posted a receive for.
"""

from dataclasses import replace

from ilm_compile.schedule.actions import Action, Kind
from ilm_compile.schedule.schedule import Schedule
from ilm_compile.schedule.timeline import timeline


def insert_comms(schedule: Schedule) -> Schedule:
    """The compute actions of `schedule` with the sends and receives that they need."""
    computes = schedule.compute_only().actions
    steps = timeline(computes, schedule.num_stages)
    events: list[tuple[int, int, int, Action]] = []
    for rank, row in enumerate(computes):
        # At one moment messages come first: a compute that begins then may need them.
        events += [(steps[a].stop, 0, rank, send) for a in row for send in schedule.sends(a)]
        events += [(steps[a].start, 1, rank, a) for a in row]
    events.sort(key=lambda event: event[:2])

    rows: list[list[Action]] = [[] for _ in computes]
    for _, _, rank, action in events:
        rows[rank].append(action)
        if action.is_send:
            rows[schedule.peer(action)].append(action.partner)
    return replace(schedule, actions=tuple(map(tuple, rows)))


def forward_only(schedule: Schedule) -> Schedule:
    """The inference schedule: the forwards of `schedule` in their order, and their messages."""
    rows = (tuple(action for action in row if action.kind is Kind.F) for row in schedule.actions)
    return insert_comms(replace(schedule, actions=tuple(rows)))

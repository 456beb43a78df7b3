"""When each compute action would run, and a picture of that: one row per rank, one column per step.

Time is counted in forwards of one stage: a forward takes one step, a backward two (one where its
weight part `W` is split off), messages none. This orders events and shows where a schedule idles;
it predicts no real times.
"""

from collections.abc import Sequence

from ilm_compile.errors import ScheduleError
from ilm_compile.schedule.actions import Action, Kind, producers

Rows = Sequence[Sequence[Action]]


def timeline(rows: Rows, num_stages: int) -> dict[Action, range]:
    """The steps of each compute action, begun as soon as its rank is free and its inputs exist.

    Raises ScheduleError where an action can never begin.
    """
    is_split = any(action.kind is Kind.W for row in rows for action in row)
    num_steps = {Kind.F: 1, Kind.B: 1 if is_split else 2, Kind.W: 1}
    steps: dict[Action, range] = {}
    rank_free = [0] * len(rows)
    pending = [list(reversed(row)) for row in rows]
    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(pending):
            while row and all(needed in steps for needed in producers(row[-1], num_stages)):
                action = row.pop()
                inputs = (steps[needed].stop for needed in producers(action, num_stages))
                start = max(rank_free[rank], *inputs, 0)
                rank_free[rank] = start + num_steps[action.kind]
                steps[action] = range(start, rank_free[rank])
                progress = True
    stuck = [f"rank {rank} at {row[-1]}" for rank, row in enumerate(pending) if row]
    if stuck:
        raise ScheduleError(
            f"the computes cannot run in this order: {', '.join(stuck)} would wait forever for a "
            "compute that is missing or comes later; give every rank an order in which inputs "
            "come first"
        )
    return steps


def grid(rows: Rows, num_stages: int) -> str:
    """The timeline as text. A dash continues the action to its left, a dot is an idle step."""
    steps = timeline(rows, num_stages)
    num_steps = max((span.stop for span in steps.values()), default=0)
    labels = ["time", *(f"rank {rank}" for rank in range(len(rows)))]
    lines = [[str(step) for step in range(num_steps)], *(["."] * num_steps for _ in rows)]
    for line, row in zip(lines[1:], rows, strict=True):
        for action in row:
            line[steps[action].start] = str(action)
            for step in steps[action][1:]:
                line[step] = "---"
    width = max((len(cell) for line in lines for cell in line), default=0)
    return "\n".join(
        " ".join([label.ljust(len(labels[-1])), *(cell.ljust(width) for cell in line)]).rstrip()
        for label, line in zip(labels, lines, strict=True)
    )

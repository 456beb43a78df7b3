"""Schedules written as text, for tests that need one to be wrong in one place."""

from ilm_compile.schedule import Action, Schedule

# 1f1b on two ranks with two micro-batches, as `build` makes it.
RANK0 = "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1"
RANK1 = "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1"


def schedule_of(*rows: str, name: str = "test", num_microbatches: int = 2) -> Schedule:
    """One row per rank; stage s lives on rank s modulo the number of rows."""
    actions = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    num_stages = 1 + max(action.stage for row in actions for action in row)
    return Schedule(
        name=name,
        num_microbatches=num_microbatches,
        stage_to_rank=tuple(stage % len(rows) for stage in range(num_stages)),
        actions=actions,
    )


def texts(schedule: Schedule) -> list[str]:
    """The actions of each rank, joined by blanks."""
    return [" ".join(map(str, row)) for row in schedule.actions]

"""Process groups by their ranks, each made once for as long as this process belongs to its job.

A group holds sockets and threads on every rank: programs that are compiled one after the other, as
for an evaluation or in a search, share those of equal ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

_Key = tuple[tuple[int, ...] | None, timedelta]
_made: dict[_Key, dist.ProcessGroup] = {}
_job: list[dist.ProcessGroup] = []  # the default group that they were made under


def group_of(ranks: Sequence[int] | None, timeout: timedelta) -> dist.ProcessGroup:
    """Return the group of these global ranks, of all if None, whose collectives wait `timeout`.

    Collective the first time: every rank of the job must ask for the same groups in one order. On a
    rank that is not among them it is a stand-in that nothing may be sent through.
    """
    world = dist.group.WORLD
    if not _job or _job[0] is not world:
        assert world is not None
        _made.clear()
        _job[:] = [world]
    key = (None if ranks is None else tuple(ranks), timeout)
    if key not in _made:
        _made[key] = dist.new_group(None if ranks is None else list(ranks), timeout=timeout)
    return _made[key]

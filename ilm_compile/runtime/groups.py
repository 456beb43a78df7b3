"""Process groups, each made once for as long as this process belongs to its job.

A group holds sockets and threads, or a communicator, on each of its ranks. So a rank makes those
alone that it is in, and programs that are compiled one after the other, as for an evaluation or in
a search, share those of equal ranks.

The world is always cut as a whole: every rank makes one group per cut, at the same time. NCCL needs
that, which splits the world's communicator, and so do torch's names of such groups: a hash of the
ranks and of the number of groups that the process is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

_Key = tuple[tuple[tuple[int, ...], ...] | None, timedelta]
_made: dict[_Key, dist.ProcessGroup] = {}
_job: list[dist.ProcessGroup] = []  # the default group that they were made under


def group_of_all(timeout: timedelta) -> dist.ProcessGroup:
    """Return a group of all ranks, whose collectives wait `timeout`. Collective the first time."""
    key = _key(None, timeout)
    if key not in _made:
        _made[key] = dist.new_group(timeout=timeout)
    return _made[key]


def own_group(
    lines: Sequence[Sequence[int]], timeout: timedelta, device: torch.device
) -> dist.ProcessGroup:
    """Return the group of the line that this rank is in; its collectives wait `timeout`.

    lines: all global ranks, each in one line. Collective the first time: every rank of the job must
    ask for the same lines in one order. device: where the default group's collectives run.
    """
    key = _key(tuple(map(tuple, lines)), timeout)
    if key not in _made:
        if _equally_many(device):
            own = next(line for line in lines if dist.get_rank() in line)
            _made[key] = dist.new_group(list(own), timeout, use_local_synchronization=True)
        else:
            for line in lines:
                group = dist.new_group(list(line), timeout)
                if dist.get_rank() in line:
                    _made[key] = group
    return _made[key]


def _key(lines: tuple[tuple[int, ...], ...] | None, timeout: timedelta) -> _Key:
    world = dist.group.WORLD
    assert world is not None
    if not _job or _job[0] is not world:
        _made.clear()
        _job[:] = [world]
    return lines, timeout


def _equally_many(device: torch.device) -> bool:
    """Whether all ranks are in equally many groups: not if the user made some of their own."""
    number = len(dist.distributed_c10d._world.pg_names)
    extremes = torch.tensor([number, -number], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    return extremes.sum().item() == 0

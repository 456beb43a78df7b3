"""What ranks tell each other of a step: a few numbers each, in one small collective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ilm_compile.runtime.mesh import Mesh


def exchange(own: Sequence[float], mesh: Mesh) -> list[list[float]]:
    """The numbers of every rank, by rank. Collective; as many numbers on each rank.

    A sum in which every rank fills its own row and zeros elsewhere, so that a value that is not
    finite stays where it belongs. (It would not survive a maximum: which side of the comparison a
    NaN stands on depends on the rank.)
    """
    if not mesh.is_distributed:
        return [list(own)]
    table = torch.zeros(mesh.world_size, len(own), dtype=torch.float64, device=mesh.device)
    table[mesh.rank] = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(table, group=mesh.group)
    rows: list[list[float]] = table.tolist()
    return rows

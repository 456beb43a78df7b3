"""The groups of ranks by kind, under the names of InternEvo's ParallelMode."""

from __future__ import annotations

from enum import Enum

import torch
import torch.distributed as dist

from ilm_compile.program.layout import TOKEN_AXES
from ilm_compile.runtime import Mesh
from ilm_compile.runtime.mesh import RANK_ORDER, Axis


class ParallelMode(Enum):
    """Kinds of groups.

    DATA: the ranks that work on other rows. ZERO1: those over which optimizer state is sharded.
    EXPERT: those that divide the experts. EXPERT_DATA: those that have the same experts, over
    which their optimizer state is sharded.
    """

    GLOBAL = "global"
    DATA = "dp"
    TENSOR = "tp"
    PIPELINE = "pp"
    ZERO1 = "zero1"
    EXPERT = "expert"
    EXPERT_DATA = "expert_data"


_VARYING: dict[ParallelMode, tuple[str, ...]] = {
    ParallelMode.GLOBAL: RANK_ORDER,
    ParallelMode.DATA: ("dp",),
    ParallelMode.TENSOR: ("tp",),
    ParallelMode.PIPELINE: ("pp",),
    ParallelMode.ZERO1: ("dp", *TOKEN_AXES),
    ParallelMode.EXPERT: ("ep",),
    ParallelMode.EXPERT_DATA: ("dp", "cp"),
}


class ProcessGroups:
    """What this rank is in each of its groups. mesh: of a `Parallel`, which made the groups."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._axes = {
            ParallelMode.GLOBAL: Axis(mesh.rank, mesh.world_size, mesh.group),
            ParallelMode.DATA: mesh.dp,
            ParallelMode.TENSOR: mesh.tp,
            ParallelMode.PIPELINE: mesh.pp,
            ParallelMode.ZERO1: mesh.fsdp,
            ParallelMode.EXPERT: mesh.ep,
            ParallelMode.EXPERT_DATA: mesh.experts.axis,
        }

    def get_group(self, mode: ParallelMode) -> dist.ProcessGroup | None:
        """The group, None in a process that was started alone."""
        return self._axes[mode].group

    def get_world_size(self, mode: ParallelMode) -> int:
        return self._axes[mode].size

    def get_local_rank(self, mode: ParallelMode) -> int:
        """This rank's number in the group."""
        return self._axes[mode].rank

    def get_global_rank(self) -> int:
        return self._mesh.rank

    def get_ranks_in_group(self, mode: ParallelMode) -> list[int]:
        """The global ranks of the group, in its order."""
        place = {name: getattr(self._mesh, name) for name in RANK_ORDER}
        grid = torch.arange(self._mesh.world_size).view([axis.size for axis in place.values()])
        own = [slice(None) if n in _VARYING[mode] else axis.rank for n, axis in place.items()]
        ranks: list[int] = grid[tuple(own)].flatten().tolist()
        return ranks

    def is_first_rank(self, mode: ParallelMode) -> bool:
        return self._axes[mode].rank == 0

    def is_last_rank(self, mode: ParallelMode) -> bool:
        return self._axes[mode].rank == self._axes[mode].size - 1

    def is_pipeline_first_stage(self) -> bool:
        return self.is_first_rank(ParallelMode.PIPELINE)

    def is_pipeline_last_stage(self) -> bool:
        return self.is_last_rank(ParallelMode.PIPELINE)

    def is_rank_for_log(self) -> bool:
        """Whether this is the rank that writes: rank 0, which knows the loss as all ranks do."""
        return self._mesh.rank == 0

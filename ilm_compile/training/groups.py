"""The groups of ranks by kind, under the names of InternEvo's ParallelMode."""

from __future__ import annotations

from enum import Enum

import torch.distributed as dist

from ilm_compile.runtime import Mesh
from ilm_compile.runtime.mesh import Axis


class ParallelMode(Enum):
    """Kinds of groups. ZERO1 is DATA: optimizer state is sharded over all data-parallel ranks."""

    GLOBAL = "global"
    DATA = "dp"
    TENSOR = "tp"
    PIPELINE = "pp"
    ZERO1 = "zero1"


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
        mesh = self._mesh
        pp, fsdp, tp = mesh.pp.rank, mesh.fsdp.rank, mesh.tp.rank
        if mode is ParallelMode.GLOBAL:
            return list(range(mesh.world_size))
        if mode is ParallelMode.TENSOR:
            return [mesh.rank_at(pp, fsdp, other) for other in range(mesh.tp.size)]
        if mode is ParallelMode.PIPELINE:
            return [mesh.rank_at(other, fsdp, tp) for other in range(mesh.pp.size)]
        step = mesh.cp.size if mode is ParallelMode.DATA else 1
        return [mesh.rank_at(pp, each, tp) for each in range(fsdp % step, mesh.fsdp.size, step)]

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

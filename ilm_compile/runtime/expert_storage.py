"""FSDP2 with a mesh of their own for experts: names of torch that are not public yet.

torch 2.13 has them. Where they are missing, as in 2.11, all parameters of a module have one mesh,
and experts are held whole by each rank that has them; their gradients are added up in one
all-reduce each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

try:
    from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp
except ImportError:
    fsdp = None  # type: ignore[assignment]

HAS_MESHES = hasattr(fsdp, "ShardPlacementResult")


def warn_of_whole_experts(size: int) -> None:
    """Say that the `size` ranks which have the same experts share no memory."""
    warnings.warn(
        f"torch {torch.__version__} gives all parameters of a module one mesh of FSDP: each of the "
        f"{size} ranks that have the same experts holds them whole, their gradients and optimizer "
        "state too; torch 2.13 can divide them",
        stacklevel=2,
    )


def placements(dims: Mapping[Tensor, int], mesh: DeviceMesh) -> Callable[[Tensor], Any]:
    """Return what `fully_shard` asks of each parameter: those of `dims` are cut there, on `mesh`.

    All others are cut along dimension 0 on the mesh of their module.
    """
    info = fsdp.FSDPMeshInfo(mesh, shard_mesh_dim=0)
    found = {
        id(tensor): fsdp.ShardPlacementResult(placement=Shard(dim), mesh_info=info)
        for tensor, dim in dims.items()
    }
    return lambda parameter: found.get(id(parameter))

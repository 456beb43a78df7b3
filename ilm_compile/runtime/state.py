"""Full tensors in the user's names and layout: out of all ranks on rank 0, and back.

All functions are collective. One full tensor at a time is in memory, beside the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.program import Variable
from ilm_compile.runtime.agree import broadcast
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.parameters import Parameters
from ilm_compile.runtime.shard import Axes, Shard


def gather_full(
    variables: Iterable[Variable],
    parameters: Parameters,
    mesh: Mesh,
    axes: Axes,
    pick: Callable[[Shard], Tensor],
) -> dict[str, Tensor]:
    """What `pick` gives of each variable, whole and on the CPU, on rank 0; empty elsewhere."""
    gathered: dict[str, Tensor] = {}
    for variable in variables:
        first = parameters.ranks[variable.name][0]
        full: Tensor | None = None
        if mesh.pp.rank == first:
            own = parameters.shards[variable.name]
            full = own.full(pick(own), mesh, axes)
        if first != 0:
            full = _to_first(full, variable, first, mesh)
        if mesh.rank == 0 and full is not None:
            gathered[variable.name] = variable.unpad(full.detach()).to("cpu", copy=True)
    return gathered


def each_of_its_own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where one is a part of other memory or shares it with an earlier one."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def _to_first(full: Tensor | None, variable: Variable, source: int, mesh: Mesh) -> Tensor | None:
    """Move a tensor from pipeline rank `source` to pipeline rank 0, once per job."""
    if not mesh.is_first_replica:
        return None
    if mesh.pp.rank == source:
        assert full is not None
        dist.send(full.contiguous(), group=mesh.pp.group, group_dst=0)
        return None
    if mesh.pp.rank != 0:
        return None
    full = torch.empty(variable.shape, dtype=variable.dtype, device=mesh.device)
    dist.recv(full, group=mesh.pp.group, group_src=source)
    return full


def names_with_gradient(parameters: Parameters, variables: list[Variable], mesh: Mesh) -> set[str]:
    """The parameters that have a gradient on any rank."""
    flags = torch.zeros(len(variables), dtype=torch.int64, device=mesh.device)
    for index, variable in enumerate(variables):
        own = parameters.shards.get(variable.name)
        flags[index] = int(own is not None and own.public.grad is not None)
    if mesh.is_distributed:
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=mesh.group)
    return {v.name for v, flag in zip(variables, flags.tolist(), strict=True) if flag}


def check_full(full: Mapping[str, Tensor], variables: list[Variable], mesh: Mesh) -> None:
    """Raise `IlmCompileError` on every rank unless rank 0's `full` has what `variables` describe.

    That is their names and aliases, user shapes and dtypes.
    """
    found = _find_problem(full, variables) if mesh.rank == 0 else ""
    if problem := broadcast(found.encode(), mesh).decode():
        raise IlmCompileError(f"load_state_dict: {problem}; nothing was loaded")


def load_full(
    full: Mapping[str, Tensor], variables: list[Variable], parameters: Parameters, mesh: Mesh
) -> None:
    """Load rank 0's `full` into all ranks; what other ranks pass is not looked at.

    It must hold every one of `variables`: see `check_full`.
    """
    for variable in variables:
        if mesh.rank == 0:
            value = variable.pad(full[variable.name].detach().to(mesh.device)).contiguous()
        else:
            value = torch.empty(variable.shape, dtype=variable.dtype, device=mesh.device)
        if mesh.is_distributed:
            dist.broadcast(value, src=0, group=mesh.group)
        if (own := parameters.shards.get(variable.name)) is not None:
            own.load(value, mesh)


def _find_problem(full: Mapping[str, Tensor], variables: list[Variable]) -> str:
    names = {alias: v for v in variables for alias in (v.name, *v.aliases)}
    if set(full) != set(names):
        missing, unexpected = sorted(set(names) - set(full)), sorted(set(full) - set(names))
        return f"expected the names of the model, missing {missing}, unexpected {unexpected}"
    for name, variable in names.items():
        shape, dtype = tuple(full[name].shape), full[name].dtype
        if shape != variable.user_shape or dtype != variable.dtype:
            return f"{name}: expected {variable.user_shape} {variable.dtype}, got {shape} {dtype}"
        if name != variable.name and not torch.equal(full[name], full[variable.name]):
            return f"{name} and {variable.name} are one tensor in the model, got two values"
    return ""

"""What ranks tell each other: a few numbers each, a text of one of them, whether any failed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.initial_values import InitialValues
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


def broadcast(data: bytes, mesh: Mesh, *, source: int = 0) -> bytes:
    """The `data` of rank `source` on every rank. Collective."""
    if not mesh.is_distributed:
        return data
    length = torch.tensor(len(data), device=mesh.device)
    dist.broadcast(length, src=source, group=mesh.group)
    if mesh.rank == source:
        value = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8).to(mesh.device)
    else:
        value = torch.empty(max(1, int(length)), dtype=torch.uint8, device=mesh.device)
    dist.broadcast(value, src=source, group=mesh.group)
    return value.cpu().numpy().tobytes()[: int(length)]


def any_rank(flags: list[bool], mesh: Mesh) -> list[bool]:
    """Of each flag, whether any rank has set it. Collective."""
    table = exchange([float(flag) for flag in flags], mesh)
    return [any(column) for column in zip(*table, strict=True)]


def first_problem(problem: str, mesh: Mesh) -> str:
    """The `problem` of the first rank that has one, prefixed by its number; else empty.

    Collective: every rank gets the same text.
    """
    table = exchange([float(bool(problem))], mesh)
    rank = next((rank for rank, (has_one,) in enumerate(table) if has_one), None)
    if rank is None:
        return ""
    text = broadcast(problem.encode(), mesh, source=rank).decode()
    return text if mesh.world_size == 1 else f"rank {rank}: {text}"


def check_same_model(values: InitialValues, mesh: Mesh) -> None:
    """Raise on every rank if the ranks were given models with different weights."""
    if not mesh.is_distributed or not (sums := values.checksums()):
        return
    own = torch.tensor(list(sums.values()), dtype=torch.float64, device=mesh.device)
    extremes = torch.stack([own, -own])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=mesh.group)
    # Not exactly: processors of another kind may add up in another order.
    is_same = torch.isclose(extremes[0], -extremes[1], rtol=1e-9, atol=1e-9)
    different = (~is_same).nonzero().flatten().tolist()
    if different:
        name = list(sums)[different[0]]
        raise IlmCompileError(
            f"parallelize: expected the same model on every rank, got different values of {name}; "
            "call torch.manual_seed before building the model, or build it on the meta device"
        )

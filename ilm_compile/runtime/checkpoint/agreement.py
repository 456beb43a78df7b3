"""Ranks agree: on a text of rank 0, and on whether something failed anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.mesh import Mesh


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


def largest(values: list[int], mesh: Mesh) -> list[int]:
    """The largest of each number over all ranks. Collective."""
    if not mesh.is_distributed:
        return values
    tensor = torch.tensor(values, device=mesh.device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=mesh.group)
    return [int(value) for value in tensor.tolist()]


def first_problem(problem: str, mesh: Mesh) -> str:
    """One rank's `problem`, prefixed by the rank if there are several; empty if none has any.

    Collective: every rank gets the same text.
    """
    # The lowest rank that has one; as a largest number, since ranks without have none to give.
    negated = largest([mesh.world_size - mesh.rank if problem else 0], mesh)[0]
    if not negated:
        return ""
    rank = mesh.world_size - negated
    text = broadcast(problem.encode(), mesh, source=rank).decode()
    return text if mesh.world_size == 1 else f"rank {rank}: {text}"


@contextmanager
def together(mesh: Mesh, task: str) -> Iterator[None]:
    """Run a block without collectives on every rank; an error on any is a `CheckpointError` on all.

    Collective at its end.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    problem = first_problem("" if error is None else describe(error), mesh)
    if problem:
        raise CheckpointError(f"{task}: {problem}") from error


def describe(error: BaseException) -> str:
    """The error in one line; our own messages need no class name."""
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"

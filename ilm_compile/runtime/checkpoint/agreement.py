"""Ranks agree: on a text of rank 0, and on whether something failed anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ilm_compile.runtime.agree import exchange
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

"""Ranks agree on whether a part of a checkpoint's work failed anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ilm_compile.runtime.agree import first_problem
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.mesh import Mesh


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

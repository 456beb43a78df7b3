"""Whether checkpoints can be written, and whether there is room, before training begins."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from math import prod

from torch.optim import Optimizer

from ilm_compile.program.program import Variable
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.retention import step_name
from ilm_compile.runtime.checkpoint.storage import Storage, remove
from ilm_compile.runtime.parallel import Parallel

# What an optimizer keeps per parameter, by the option of its groups that makes it do so.
_KEPT = {"betas": 2, "momentum": 1}
GIB = 2**30


def estimate(parallel: Parallel, optimizer: Optimizer | None) -> int:
    """Bytes of one checkpoint: the model, and what the optimizer keeps, in the same dtype.

    Known before the first step, when the optimizer holds nothing yet.
    """
    variables = parallel.saved_variables().values()
    total = _bytes(variables)
    if optimizer is not None:
        group = optimizer.param_groups[0]
        kept = max((n for option, n in _KEPT.items() if group.get(option)), default=0)
        total += kept * _bytes(v for v in variables if v.requires_grad)
    return total


def check_space(storage: Storage, size: int, *, num_kept: int) -> None:
    """Raise `CheckpointError` without room for one checkpoint; warn without room for all kept.

    num_kept: those that will be there beside the one being written, less those there now.
    """
    free = storage.free_bytes()
    if free is None:
        return
    if free < size:
        raise CheckpointError(
            f"{storage.url}: a checkpoint needs about {size / GIB:.2f} GiB, {free / GIB:.2f} GiB "
            "are free; free some space or choose another folder"
        )
    needed = size * (max(0, num_kept) + 1)
    if free < needed:
        warnings.warn(
            f"{storage.url}: the checkpoints that are kept need about {needed / GIB:.2f} GiB, "
            f"{free / GIB:.2f} GiB are free; keep fewer or free some space",
            stacklevel=2,
        )


def probe(storage: Storage, nonce: str) -> None:
    """Write and delete a file."""
    working = storage.working_name(step_name(0), nonce)
    if working in storage.folders():
        return  # an object store that holds the checkpoint of step 0
    storage.prepare(working)
    with storage.create(f"{working}/probe") as file:
        file.write(b"probe")
    remove(storage, working)


def _bytes(variables: Iterable[Variable]) -> int:
    return sum(prod(v.user_shape) * v.dtype.itemsize for v in variables)

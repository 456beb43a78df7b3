"""Whether all ranks were started with the same config and the same code."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist

import ilm_compile
from ilm_compile.config import Config
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.mesh import choose_device, join_job
from ilm_compile.training.launch import read_place

_WHAT = ("config", "code of ilm_compile")


def agree_on_start(config: Config) -> None:
    """Join the job's process group and compare hashes, the first collective of all.

    A rank with another plan would wait in another group; here it is named. Raises
    `IlmCompileError` on all ranks with the numbers of those that differ from rank 0. Does nothing
    in a process that was started alone.
    """
    if not dist.is_initialized():
        if not read_place().is_started:
            return
        join_job(choose_device(), timeout=timedelta(seconds=config.train.timeout_s))
    numbers = [_number(config.to_toml().encode()), _number(code_digest())]
    own = torch.tensor(numbers, device=choose_device())
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    for column, what in enumerate(_WHAT):
        values = [int(each[column]) for each in everyone]
        if others := [rank for rank, value in enumerate(values) if value != values[0]]:
            raise IlmCompileError(
                f"start: expected the same {what} on all ranks, ranks {others} differ from rank 0; "
                "start every node with the same files and flags"
            )


@cache
def code_digest() -> bytes:
    """A hash of the package's source files."""
    root = Path(ilm_compile.__file__).parent
    digest = hashlib.sha256()
    for folder in (root, root / "passes", root / "kernels"):  # links are not followed by rglob
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.digest()


def _number(data: bytes) -> int:
    """The first 63 bits of a hash: a tensor holds them exactly."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8]) >> 1

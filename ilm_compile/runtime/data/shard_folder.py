"""A folder of token files: which there are, and of which type each is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.shard import TokenShard
from ilm_compile.runtime.data.shard_summary import Known, read_summary, stamp_of, write_summary

SUFFIX = ".bin"
UNTYPED = "text"


def open_shards(folder: str | Path) -> list[TokenShard]:
    """Every ``*.bin`` below `folder`, in the order of their paths.

    Files that a summary of the folder knows are opened when they are read, others at once.
    The type of a file is the name of the sub-folder of `folder` that it lies in ("en", "code"), at
    any depth; `UNTYPED` for a file of `folder` itself. A single ``*.bin`` may be given too.
    Raises `IlmCompileError` if there is none, or for a file that is damaged.
    """
    root = Path(folder)
    if root.is_file():
        return [TokenShard(root, type_name=UNTYPED)]
    if not root.is_dir():
        raise IlmCompileError(f"token files: expected a folder at {root}, found none")
    paths = sorted(path for path in root.rglob(f"*{SUFFIX}") if not _is_hidden(path, root))
    if not paths:
        raise IlmCompileError(
            f"token files: expected *{SUFFIX} files below {root}, found none; make them with "
            "ilm-compile prepare-data"
        )
    names = [path.relative_to(root).as_posix() for path in paths]
    rank, size = _place()
    known = read_summary(root)
    if rank == 0:
        known = {name: k for name, k in known.items() if k.stamp == stamp_of(root / name)}
    shards = [
        TokenShard(path, type_name=_type_name(path, root), known=known.get(name))
        for name, path in zip(names, paths, strict=True)
    ]
    if rank == 0 and size > 1 and list(known) != names:
        summarize(root, shards)
    return shards


def summarize(root: Path, shards: list[TokenShard], *, is_final: bool = False) -> None:
    """Write down what all files below `root` hold, so that other ranks need not look.

    Not while one of them may be changing, unless the caller, who wrote them, says `is_final`.
    """
    known = {
        shard.path.relative_to(root).as_posix(): Known(
            stamp_of(shard.path), shard.digest(), shard.lengths
        )
        for shard in shards
    }
    if is_final or all(each.is_settled for each in known.values()):
        write_summary(root, known)


def _place() -> tuple[int, int]:
    """This process's rank and the number of all, by the process group or the launcher."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def open_validation_shards(folder: str | Path) -> dict[str, list[TokenShard]]:
    """The validation sets of `folder`: each of its types is a set of its own, by name."""
    sets: dict[str, list[TokenShard]] = {}
    for shard in open_shards(folder):
        sets.setdefault(shard.type_name, []).append(shard)
    return sets


def type_ids(shards: list[TokenShard]) -> dict[str, int]:
    """A number for each type, in the order of names, as InternEvo's get_dataset_type_ids_map."""
    return {name: number for number, name in enumerate(sorted({s.type_name for s in shards}))}


def check_type_ids(shards: list[TokenShard], ids: Mapping[str, int]) -> None:
    """Raise `IlmCompileError` unless every type of `shards` has a number of at least 0."""
    for shard in shards:
        if ids.get(shard.type_name, -1) < 0:
            raise IlmCompileError(
                f"token files: expected the type {shard.type_name!r} of {shard.path} among "
                f"{dict(ids)}, each with a number of at least 0"
            )


def _is_hidden(path: Path, root: Path) -> bool:
    """Whether it belongs to a folder that is still being written, or that was given up."""
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _type_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else UNTYPED

"""A folder of token files: which there are, and of which type each is."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.first_reader import leaders, reading_for_others, wait_for
from ilm_compile.runtime.data.shard import TokenShard
from ilm_compile.runtime.data.shard_summary import (
    NAME,
    Known,
    read_summary,
    stamp_of,
    write_summary,
)

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
    for leader in leaders(rank):
        if rank > 0 and known.keys() >= set(names):
            break
        if leader == rank:
            with reading_for_others(root, rank) as tell:
                return _lead(root, names, size, known, tell)
        wait_for(root, leader)
        known = read_summary(root)
    return _opened(root, names, known)


def _lead(
    root: Path, names: list[str], size: int, known: Mapping[str, Known], tell: Callable[[], object]
) -> list[TokenShard]:
    """Open the files, and write a summary for the others unless there is one that is right."""
    known = {name: k for name, k in known.items() if k.stamp == stamp_of(root / name)}
    shards = _opened(root, names, known, tell)
    if size > 1 and list(known) != names and (why := summarize(root, shards)):
        warnings.warn(
            f"token files: {root} has no {NAME} that says what its files hold, and {why}, so each "
            f"of the {size} ranks reads all their indexes; ilm-compile prepare-data writes one",
            stacklevel=4,
        )
    return shards


def _opened(
    root: Path,
    names: list[str],
    known: Mapping[str, Known],
    tell: Callable[[], object] = lambda: None,
) -> list[TokenShard]:
    shards = []
    for name in names:
        path = root / name
        shards.append(TokenShard(path, type_name=_type_name(path, root), known=known.get(name)))
        if name not in known:
            tell()
    return shards


def summarize(root: Path, shards: list[TokenShard], *, is_final: bool = False) -> str:
    """Write down what all files below `root` hold, so that other ranks need not look.

    Not while one of them may be changing, unless the caller, who wrote them, says `is_final`.
    Returns why it is not written, "" if it is.
    """
    known = {
        shard.path.relative_to(root).as_posix(): Known(
            stamp_of(shard.path), shard.digest(), shard.lengths
        )
        for shard in shards
    }
    if not is_final and not all(each.is_settled for each in known.values()):
        return "some have just been changed"
    return "" if write_summary(root, known) else "none can be written there"


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

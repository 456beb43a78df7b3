"""A folder of token files: which there are, and of which type each is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.shard import TokenShard

SUFFIX = ".bin"
UNTYPED = "text"


def open_shards(folder: str | Path) -> list[TokenShard]:
    """Open every ``*.bin`` below `folder`, in the order of their paths.

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
    return [TokenShard(path, type_name=_type_name(path, root)) for path in paths]


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

"""What the token files of a folder hold, in one file that is read instead of every index.

`prepare-data` writes it, and the first of several ranks where there is none, for which the others
wait if there is a process group (`first_reader`). Rank 0 compares it with sizes
and times of the files; the others believe it of the files that there are. What has changed behind
it shows when a document is read, and when the ranks compare their data.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ilm_compile.runtime.data.shard_index import Int64, index_path

NAME = ".ilm_compile-summary"
_VERSION = "1"
_SETTLED_NS = 2 * 10**9  # a file changed later than this ago may change again at the same time


@dataclass(frozen=True, slots=True)
class Known:
    """Of one token file. stamp: size and time of change of the file, then those of its index."""

    stamp: tuple[int, ...]
    digest: bytes
    lengths: Int64

    @property
    def num_bytes(self) -> int:
        return self.stamp[0]

    @property
    def is_settled(self) -> bool:
        """Whether another change of the file would change its stamp."""
        return max(self.stamp[1::2]) < time.time_ns() - _SETTLED_NS


def stamp_of(shard: Path) -> tuple[int, ...]:
    """The stamp of a token file now, empty if it or its index is not there."""
    try:
        found = (os.stat(shard), os.stat(index_path(shard)))
    except OSError:
        return ()
    return tuple(number for each in found for number in (each.st_size, each.st_mtime_ns))


def read_summary(folder: Path) -> dict[str, Known]:
    """What is known of the token files of `folder` by relative path; nothing if it is damaged."""
    try:
        with safe_open(folder / NAME, framework="numpy") as file:
            facts, lengths = file.metadata() or {}, file.get_tensor("lengths")
        if facts["version"] != _VERSION or facts["sha256"] != _hash(lengths):
            return {}
        files = json.loads(facts["files"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}
    ends = np.cumsum([file["documents"] for file in files])
    return {
        file["path"]: Known(tuple(file["stamp"]), bytes.fromhex(file["digest"]), own)
        for file, own in zip(files, np.split(lengths, ends[:-1]), strict=True)
    }


def write_summary(folder: Path, known: Mapping[str, Known]) -> bool:
    """Write it, in one rename; False in a folder that cannot be written to."""
    lengths = np.concatenate([each.lengths for each in known.values()])
    files = [
        {
            "path": path,
            "stamp": each.stamp,
            "digest": each.digest.hex(),
            "documents": len(each.lengths),
        }
        for path, each in known.items()
    ]
    facts = {"version": _VERSION, "sha256": _hash(lengths), "files": json.dumps(files)}
    temporary = folder / f"{NAME}.{os.urandom(4).hex()}"
    with suppress(OSError, SafetensorError):
        try:
            save_file({"lengths": lengths}, temporary, facts)
            temporary.replace(folder / NAME)
            return True
        finally:
            temporary.unlink(missing_ok=True)
    return False


def _hash(lengths: Int64) -> str:
    return hashlib.sha256(lengths.tobytes()).hexdigest()

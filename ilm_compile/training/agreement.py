"""Whether all ranks were started with the same config and the same code."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import ilm_compile
from ilm_compile.config import Config
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime import Mesh
from ilm_compile.runtime.agree import exchange

_BITS = 52  # of a hash that a float64 holds exactly
_WHAT = ("config", "code of ilm_compile")


def agree_on_start(config: Config, mesh: Mesh) -> None:
    """Raise `IlmCompileError` on all ranks, naming those that differ from rank 0. Collective."""
    own = [float(_number(config.to_toml().encode())), float(_number(code_digest()))]
    rows = exchange(own, mesh)
    for column, what in enumerate(_WHAT):
        others = [rank for rank, row in enumerate(rows) if row[column] != rows[0][column]]
        if others:
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
    return int.from_bytes(hashlib.sha256(data).digest()) >> (256 - _BITS)

"""A source of safetensors: one file, a folder of them, or a folder with Hugging Face's index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from ilm_compile.convert.source import Spec
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.checkpoint.boxes import Box
from ilm_compile.runtime.checkpoint.tensor_file import (
    SUFFIX,
    Entry,
    load_json,
    read_box,
    read_header,
)

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class SafetensorsFiles:
    """Opens every file at once and reads from them when asked."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._entries: dict[str, tuple[BinaryIO, Entry, Path]] = {}
        for file_path in _files(path):
            file = _open(file_path)
            entries = read_header(file, file_path.stat().st_size, str(file_path))
            for name, entry in entries.items():
                if name in self._entries:
                    raise IlmCompileError(
                        f"{name} is in two files, {self._entries[name][2]} and {file_path}"
                    )
                self._entries[name] = (file, entry, file_path)

    def specs(self) -> Mapping[str, Spec]:
        return {name: Spec(e.shape, e.dtype) for name, (_, e, _) in self._entries.items()}

    def read(self, name: str, box: Box) -> Tensor:
        file, entry, path = self._entries[name]
        return read_box(file, entry, box, str(path))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / INDEX).exists():
        return indexed_files(path, INDEX)
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files:
        raise IlmCompileError(
            f"expected *{SUFFIX} files in {path}, found none, nor pytorch_model*.bin"
        )
    return files


def indexed_files(folder: Path, name: str) -> list[Path]:
    """The files that Hugging Face's index `name` in `folder` lists."""
    index = folder / name
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise IlmCompileError(f"{index}: expected at most {MAX_INDEX_BYTES} bytes")
    names = load_json(index.read_bytes(), str(index)).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise IlmCompileError(f"{index}: expected a weight_map from tensor to file")
    files = sorted({str(name) for name in names.values()})
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise IlmCompileError(f"{index}: {name!r:.200} is not the name of a file beside it")
        if not (folder / name).is_file():
            raise IlmCompileError(f"{index}: names {name}, which is not in {folder}")
    return [folder / name for name in files]


def _open(path: Path) -> BinaryIO:
    if not path.is_file():
        raise IlmCompileError(f"expected a safetensors file or a folder of them at {path}")
    return path.open("rb")

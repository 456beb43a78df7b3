"""Writes a source as safetensors: one file, or a folder of shards with Hugging Face's index."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ilm_compile.convert.safetensors_files import INDEX
from ilm_compile.convert.source import Source, Spec
from ilm_compile.errors import IlmCompileError
from ilm_compile.files import whole_file
from ilm_compile.runtime.checkpoint.boxes import Box, whole
from ilm_compile.runtime.checkpoint.tensor_file import (
    READ_BYTES,
    SUFFIX,
    write_tensor_file,
)

DEFAULT_SHARD_BYTES = 5 * 10**9  # as Hugging Face does


def write_weights(
    source: Source,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra: Mapping[str, str | bytes] | None = None,
) -> int:
    """Write all tensors; returns how many. Nothing is there under `path` until all is written.

    path: a ``.safetensors`` file, or a folder that must not exist or be empty. dtype: of the
    floating-point tensors, unchanged if None. extra: other files for the folder, by name.
    """
    specs = {n: _cast(spec, dtype) for n, spec in source.specs().items()}
    if not specs:
        raise IlmCompileError(f"convert: expected tensors in {source.where}, found none")
    if path.suffix == SUFFIX:
        with whole_file(path) as partial:
            _write_file(source, specs, partial)
        return len(specs)
    with new_folder(path) as working:
        _write_folder(source, specs, working, shard_bytes)
        for name, content in (extra or {}).items():
            data = content.encode() if isinstance(content, str) else content
            (working / name).write_bytes(data)
    return len(specs)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `path` once all is written; that must be new or empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    working = path.with_name(f"{path.name}.tmp-{os.urandom(4).hex()}")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise IlmCompileError(f"convert: {path} exists; expected a new or an empty folder")
    try:
        working.mkdir()
        yield working
        if path.exists():
            path.rmdir()
        os.rename(working, path)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _write_folder(
    source: Source, specs: Mapping[str, Spec], folder: Path, shard_bytes: int
) -> None:
    shards = _shards(specs, shard_bytes)
    if len(shards) == 1:
        _write_file(source, specs, folder / f"model{SUFFIX}")
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}{SUFFIX}"
        _write_file(source, {name: specs[name] for name in names}, folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    total = sum(map(_bytes, specs.values()))
    index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(index_text)


def _shards(specs: Mapping[str, Spec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + _bytes(spec) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(spec)
    return shards


def _write_file(source: Source, specs: Mapping[str, Spec], path: Path) -> None:
    with path.open("wb") as file:
        write_tensor_file(
            file,
            {name: (spec.dtype, spec.shape) for name, spec in specs.items()},
            _pieces(source, specs),
            {"format": "pt"},  # Hugging Face wants to be told that the tensors are PyTorch's
        )
        file.flush()
        os.fsync(file.fileno())


def _pieces(source: Source, specs: Mapping[str, Spec]) -> Iterator[Tensor]:
    """All tensors, a few rows at a time."""
    for name, spec in specs.items():
        if not spec.shape:
            yield source.read(name, whole(())).to(spec.dtype)
            continue
        tail = spec.shape[1:]
        step = max(1, READ_BYTES // max(1, prod(tail) * spec.dtype.itemsize))
        for row in range(0, spec.shape[0], step):
            rows = Box((row, *(0 for _ in tail)), (min(step, spec.shape[0] - row), *tail))
            yield source.read(name, rows).to(spec.dtype)


def _bytes(spec: Spec) -> int:
    return prod(spec.shape) * spec.dtype.itemsize


def _cast(spec: Spec, dtype: torch.dtype | None) -> Spec:
    is_cast = dtype is not None and spec.dtype.is_floating_point
    return Spec(spec.shape, dtype) if is_cast and dtype is not None else spec

"""Safetensors files: weights of a model, and packed text."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime import PackedText

SUFFIX = ".safetensors"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, or of all the files in a folder."""
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise IlmCompileError(f"expected *{SUFFIX} files in {path}, found none")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise IlmCompileError(f"expected a safetensors file at {file}: {error}") from error
    return tensors


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one file, its folder too if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Copies, since parts of one matrix share memory, which the format cannot express. Hugging Face
    # wants to be told that the tensors are of PyTorch ("pt").
    copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    save_file(copies, path, metadata={"format": "pt"})


def write_text(text: PackedText, path: Path) -> None:
    """Write packed text, a tensor for each of its fields."""
    write_tensors({field.name: getattr(text, field.name) for field in fields(text)}, path)


def read_text(path: Path) -> PackedText:
    """Packed text from a file of `write_text`."""
    tensors = read_tensors(path)
    expected = {field.name for field in fields(PackedText)}
    if set(tensors) != expected:
        raise IlmCompileError(
            f"{path} is not from ilm-compile prepare-data: expected the tensors "
            f"{', '.join(sorted(expected))}, got {', '.join(sorted(tensors)[:5])}"
        )
    return PackedText(**tensors)

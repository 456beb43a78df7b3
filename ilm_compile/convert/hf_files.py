"""A source of a Hugging Face folder: safetensors, or the older pytorch_model.bin; its config.json.

Nothing is unpickled: see `torch_pickle`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ilm_compile.convert.safetensors_files import INDEX, SafetensorsFiles, indexed_files
from ilm_compile.convert.source import Aliased, Source, Spec
from ilm_compile.convert.torch_file import TorchFile
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.checkpoint.boxes import Box
from ilm_compile.runtime.checkpoint.tensor_file import SUFFIX, load_json

CONFIG = "config.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
MAX_CONFIG_BYTES = 1 << 20
_TORCH = (".bin", ".pt", ".pth")
# The head that a tied folder lacks, by the embedding that stands for it.
_HEADS = {
    "model.embed_tokens.weight": "lm_head.weight",
    "model.tok_embeddings.weight": "output.weight",
}


class TorchFiles:
    """The tensors of several files of `torch.save`."""

    def __init__(self, where: Path, paths: list[Path]) -> None:
        self.where = str(where)
        self._files: dict[str, TorchFile] = {}
        for path in paths:
            file = TorchFile(path)
            for name in file.entries:
                if name in self._files:
                    raise IlmCompileError(
                        f"{name} is in two files, {self._files[name].path} and {path}"
                    )
                self._files[name] = file

    def specs(self) -> Mapping[str, Spec]:
        return {
            name: Spec(file.entries[name].shape, file.entries[name].dtype)
            for name, file in self._files.items()
        }

    def read(self, name: str, box: Box) -> Tensor:
        return self._files[name].read(name, box)


def open_hf(path: Path) -> Source:
    """The tensors in a file or a folder of either kind, safetensors first."""
    if path.is_file() and path.suffix in _TORCH:
        return TorchFiles(path, [path])
    is_newer = (path / INDEX).exists() or any(path.glob(f"*{SUFFIX}"))
    if path.is_dir() and not is_newer:
        if (path / TORCH_INDEX).exists():
            return TorchFiles(path, indexed_files(path, TORCH_INDEX))
        if files := sorted(path.glob("pytorch_model*.bin")):
            return TorchFiles(path, files)
    return SafetensorsFiles(path)


def read_config(path: Path) -> dict[str, Any] | None:
    """What config.json says of the weights at `path`, a folder or a file of one; None without."""
    if path.is_file() and not path.stem.startswith(("model", "pytorch_model")):
        return None  # a file of its own; what lies beside it need not belong to it
    config = (path if path.is_dir() else path.parent) / CONFIG
    if not config.is_file():
        return None
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise IlmCompileError(f"{config}: expected at most {MAX_CONFIG_BYTES} bytes")
    return load_json(config.read_bytes(), str(config))


def with_head(source: Source, config: Mapping[str, Any] | None) -> Source:
    """The source with the head that tied embeddings leave out.

    Raises `IlmCompileError` if there is neither a head nor a config that says they are tied.
    """
    names = source.specs()
    embedding = next((name for name in _HEADS if name in names), None)
    if embedding is None:
        return source
    head = _HEADS[embedding]
    if config is not None and config.get("tie_word_embeddings") is True:
        warnings.warn(
            f"{source.where}: the embeddings are tied: {head} is {embedding}; here they are two "
            "tensors, equal at first and trained apart",
            stacklevel=2,
        )
        return Aliased(source, {head: embedding})
    if head not in names:
        raise IlmCompileError(
            f"convert: {source.where}: {head}: expected the matrix of the output, got no such "
            f"tensor; where it is tied to {embedding}, a {CONFIG} beside the weights says so: "
            '"tie_word_embeddings": true'
        )
    return source

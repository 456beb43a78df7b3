"""A source of the weights in one of our own checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ilm_compile.convert.source import Spec
from ilm_compile.runtime.checkpoint.boxes import Box
from ilm_compile.runtime.checkpoint.parts import contents
from ilm_compile.runtime.checkpoint.slices import SliceReader, check_file, read_manifest
from ilm_compile.runtime.checkpoint.storage import MANIFEST, open_storage

_PREFIX = "model/"


class CheckpointFiles:
    """Checks the hashes of all files, then reads from them when asked."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        storage, name = open_storage(path.absolute().parent), path.absolute().name
        manifest = read_manifest(storage, name)
        for part in contents(storage, name, manifest):
            for file_name, file in part.files.items():
                check_file(storage, name, file_name, file)
        self._reader = SliceReader(storage, name, manifest)
        self.config = manifest.config  # that it was made with

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether `path` is the folder of a checkpoint."""
        return (path / MANIFEST).is_file()

    def specs(self) -> Mapping[str, Spec]:
        return {
            name.removeprefix(_PREFIX): Spec(record.shape, record.dtype)
            for name, record in self._reader.manifest.tensors.items()
            if name.startswith(_PREFIX)
        }

    def read(self, name: str, box: Box) -> Tensor:
        return self._reader.read(_PREFIX + name, box)

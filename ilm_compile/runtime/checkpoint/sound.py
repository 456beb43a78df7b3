"""Whether a checkpoint is one to go on from: its files unchanged, its numbers finite.

Weights that are not finite never recover: every step from them is skipped. What is trained, and
what the optimizer keeps of each of its elements, must be finite; elsewhere only NaN is a fault, for
a mask may hold infinities.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from ilm_compile.runtime.checkpoint.boxes import Box, whole
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.checkpoint.retention import step_name
from ilm_compile.runtime.checkpoint.slices import check_file, read_manifest
from ilm_compile.runtime.checkpoint.storage import Storage
from ilm_compile.runtime.checkpoint.tensor_file import READ_BYTES, Entry, read_box, read_header


class Soundness:
    """What is known of the checkpoints in `storage`, by step; the rest is found out when asked."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._known: dict[int, bool] = {}

    def note(self, step: int, is_sound: bool) -> None:
        """Remember what was found out elsewhere."""
        self._known[step] = is_sound

    def is_known(self, step: int) -> bool:
        """Whether it was written, or looked at, here."""
        return step in self._known

    def is_sound(self, step: int) -> bool:
        """Whether to go on from it. Reads all of it the first time, then looks at sizes only."""
        name, known = step_name(step), self._known.get(step)
        if known is not False:
            try:
                manifest = read_manifest(self._storage, name)
                if known is None:
                    check_files(self._storage, name, manifest, manifest.files)
                sizes = {file: self._storage.size(f"{name}/{file}") for file in manifest.files}
                self._known[step] = sizes == {f: e.size for f, e in manifest.files.items()}
            except (CheckpointError, OSError):
                self._known[step] = False
        return self._known[step]


def check_files(storage: Storage, name: str, manifest: Manifest, files: Iterable[str]) -> None:
    """Raise `CheckpointError` naming the file that is not as the manifest says or not finite."""
    trained = {parameter for group in manifest.groups for parameter in group["params"]}
    names = {(s.file, s.key): n for n, r in manifest.tensors.items() for s in r.slices}
    for file_name in files:
        check_file(storage, name, manifest, file_name)
        path = f"{storage.url}/{name}/{file_name}"
        with storage.open(f"{name}/{file_name}") as file:
            header = read_header(file, manifest.files[file_name].size, path)
            for key, entry in header.items():
                tensor = names.get((file_name, key), "")
                if entry.dtype.is_floating_point:
                    for rows in _row_boxes(entry):
                        check_finite(tensor, read_box(file, entry, rows, path), trained, path)


def check_finite(name: str, value: Tensor, trained: Collection[str], where: str) -> None:
    """Raise `CheckpointError` if the tensor `name` of a checkpoint holds what cannot be trained on.

    trained: the names of the optimizer's parameters.
    """
    if not value.is_floating_point():
        return
    kind, _, rest = name.partition("/")
    numbers = value.float() if value.itemsize == 1 else value  # float8 has no isfinite
    must_be_finite = rest in trained if kind == "model" else value.ndim > 0
    is_good = torch.isfinite(numbers).all() if must_be_finite else not numbers.isnan().any()
    if not is_good:
        raise CheckpointError(
            f"{where}: {name} holds numbers that are not finite; no training goes on from them"
        )


def _row_boxes(entry: Entry) -> Iterator[Box]:
    """All of a tensor, a few rows at a time."""
    if not entry.shape:
        yield whole(())
        return
    tail = entry.shape[1:]
    step = max(1, READ_BYTES * entry.shape[0] // max(1, entry.num_bytes))
    for row in range(0, entry.shape[0], step):
        yield Box((row, *(0 for _ in tail)), (min(step, entry.shape[0] - row), *tail))

"""Whether a checkpoint is one to go on from: its files unchanged, its numbers finite.

Weights that are not finite never recover: every step from them is skipped. What is trained, and
what the optimizer keeps of each of its elements, must be finite; elsewhere only NaN is a fault, for
a mask may hold infinities.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ilm_compile.runtime.checkpoint.boxes import Box, whole
from ilm_compile.runtime.checkpoint.errors import CheckpointError
from ilm_compile.runtime.checkpoint.manifest import Manifest
from ilm_compile.runtime.checkpoint.parts import Part, contents
from ilm_compile.runtime.checkpoint.retention import step_name
from ilm_compile.runtime.checkpoint.slices import check_file, read_manifest
from ilm_compile.runtime.checkpoint.storage import Storage
from ilm_compile.runtime.checkpoint.tensor_file import READ_BYTES, Entry, read_box, read_header


class Soundness:
    """What is known of the checkpoints in `storage`, by step; the rest is found out when asked.

    rank, size: of those who ask together and look at equal shares; each knows of its own.
    """

    def __init__(self, storage: Storage, *, rank: int = 0, size: int = 1) -> None:
        self._storage = storage
        self._share = {"rank": rank, "size": size}
        self._known: dict[int, bool] = {}

    def note(self, step: int, is_sound: bool) -> None:
        """Remember what was found out elsewhere."""
        self._known[step] = is_sound

    def is_known(self, step: int) -> bool:
        """Whether it was written, or looked at, here."""
        return step in self._known

    def is_bad(self, step: int) -> bool:
        """Whether it is known not to be one to go on from."""
        return self._known.get(step) is False

    def is_sound(self, step: int) -> bool:
        """Whether to go on from it, by the own share of it.

        Reads all of that the first time, then looks at sizes only.
        """
        name, known = step_name(step), self._known.get(step)
        if known is not False:
            try:
                manifest = read_manifest(self._storage, name)
                if known is None:
                    check_files(self._storage, name, manifest, **self._share)
                else:
                    for part in contents(self._storage, name, manifest, **self._share):
                        check_sizes(self._storage, name, part)
                self._known[step] = True
            except (CheckpointError, OSError):
                self._known[step] = False
        return self._known[step]


def check_files(
    storage: Storage, name: str, manifest: Manifest, *, rank: int = 0, size: int = 1
) -> None:
    """Raise `CheckpointError` naming the file that is not as it was written or not finite.

    rank, size: of `size` equal shares of the files only that number is looked at.
    """
    trained = {parameter for group in manifest.groups for parameter in group["params"]}
    for part in contents(storage, name, manifest, rank=rank, size=size):
        names = {(s.file, s.key): n for n, r in part.tensors.items() for s in r.slices}
        for file_name, expected in part.files.items():
            check_file(storage, name, file_name, expected)
            path = f"{storage.url}/{name}/{file_name}"
            with storage.open(f"{name}/{file_name}") as file:
                for key, entry in read_header(file, expected.size, path).items():
                    tensor = names.get((file_name, key), "")
                    if entry.dtype.is_floating_point:
                        for rows in _row_boxes(entry):
                            check_finite(tensor, read_box(file, entry, rows, path), trained, path)


def check_sizes(storage: Storage, name: str, part: Part) -> None:
    """Raise `CheckpointError` naming a file of `part` that has another size or is gone."""
    for file_name, expected in part.files.items():
        path = f"{storage.url}/{name}/{file_name}"
        try:
            found = storage.size(f"{name}/{file_name}")
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        if found != expected.size:
            raise CheckpointError(f"{path}: wrote {expected.size} bytes, found {found}")


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

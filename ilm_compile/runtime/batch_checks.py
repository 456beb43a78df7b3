"""What a batch is looked at for before a step: its ids, and whether the ranks were given the same.

Both are quiet faults. Under tp an id outside the vocabulary picks a row of zeros, and a label there
a class of its own; under pp the inputs of one rank's batch would meet the labels of another's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ilm_compile.errors import BatchError
from ilm_compile.program.program import Lookup
from ilm_compile.runtime.agree import exchange
from ilm_compile.runtime.batch import Batch
from ilm_compile.runtime.mesh import Mesh

EVERY = 100  # batches; the numbers are read on the host, which waits for a GPU
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXACT = 2**52  # float64 holds every integer up to here
_SAME = {  # by whether batches are local: what is expected, and what to do
    False: (
        "the same global batch on every rank",
        "give every rank all rows in the same order: shuffle by one seed, do not cut the data by "
        "rank (each takes its own rows of the batch), or say batch_is_local=True",
    ),
    True: (
        "the same rows on the ranks of one data-parallel rank",
        "cut a batch by mesh.dp.rank, not by the global rank: its tp and pp ranks work on the same "
        "rows",
    ),
}


def check_ids(
    batch: Batch,
    lookups: Sequence[Lookup],
    *,
    num_slices: int,
    on_device: bool = False,
    first_slice: int = 0,
) -> None:
    """Raise `BatchError` for an integer that picks no row or class of a lookup.

    num_slices: micro-batches of `batch`, a part of the global one that begins with its micro-batch
    `first_slice`. on_device: look at tensors on a GPU too.
    """
    for lookup in lookups:
        names = lookup.inputs
        if not names or not (on_device or all(batch[n].device.type == "cpu" for n in names)):
            continue
        for index, ids in enumerate(lookup.of(batch, num_slices)):
            low, high = (int(end) for end in torch.aminmax(ids))
            if 0 <= low and high < lookup.size:
                continue
            wrong = (ids < 0) | (ids >= lookup.size)
            if lookup.ignored is not None:
                wrong &= ids != lookup.ignored
            if wrong.any():
                first = int(ids[wrong][0])
                values = [batch[name].cpu().chunk(num_slices)[index] for name in names]
                place = _place(names, values, first, first_slice + index)
                allowed = "" if lookup.ignored is None else f", or {lookup.ignored} for no target"
                raise BatchError(
                    f"batch: expected {' and '.join(names)} from 0 to {lookup.size - 1}{allowed}, "
                    f"for there are {lookup.size} {lookup.what} ({lookup.where}), got {first}"
                    f"{place}; the tokenizer is of another vocabulary than the model, or this is "
                    "padding: mask it"
                )


def _place(names: Sequence[str], values: Sequence[Tensor], wrong: int, index: int) -> str:
    """Where `wrong` is in the whole batch, if it is there as it is."""
    for name, value in zip(names, values, strict=True):
        found = (value == wrong).nonzero()
        if len(found):
            row, *columns = found[0].tolist()
            column = f", column {columns[0]}" if columns else ""
            return f" in {name}, row {row + index * value.shape[0]}{column}"
    return f" from micro-batch {index}"


class SameBatch:
    """Compares the batches of the ranks: the first, and one of every `every`. Collective.

    Global ones are compared on all ranks, local ones on those of the same data-parallel rank.
    """

    def __init__(self, mesh: Mesh, *, every: int = EVERY) -> None:
        self._mesh = mesh
        self._every = every
        self._num_batches = 0

    def check(self, batch: Batch, *, is_local: bool = False) -> None:
        """Raise `BatchError` on every rank if they were not given the same."""
        is_due = self._num_batches % self._every == 0
        self._num_batches += 1
        if not is_due or not self._mesh.is_distributed:
            return
        names = sorted(batch)
        sums = [float(_checksum(batch[name])) for name in names]
        flags, *columns = zip(*exchange([float(is_local), *sums], self._mesh), strict=True)
        if len(set(flags)) > 1:
            raise BatchError(
                f"batch: expected batch_is_local alike on every rank, got True on rank "
                f"{flags.index(1)} and False on rank {flags.index(0)}"
            )
        groups = self._mesh.replicas() if is_local else [range(self._mesh.world_size)]
        for name, values in zip(names, columns, strict=True):
            for ranks in groups:
                self._compare(name, {rank: values[rank] for rank in ranks}, is_local=is_local)

    def _compare(self, name: str, sums: Mapping[int, float], *, is_local: bool) -> None:
        """Raise unless the sums, by rank, are all one."""
        (usual, _), *others = Counter(sums.values()).most_common()
        if not others:
            return
        different = [rank for rank, own in sums.items() if own != usual]
        what, remedy = _SAME[is_local]
        first = next(rank for rank, own in sums.items() if own == usual)
        raise BatchError(
            f"batch: expected {what}, got another {name} on rank "
            f"{', '.join(map(str, different))} than on rank {first}; {remedy}"
        )


def _checksum(tensor: Tensor) -> int:
    """A number of the bits and their places."""
    bits = tensor.detach().contiguous().flatten()
    if bits.dtype == torch.bool or bits.dtype.itemsize not in _BITS:
        bits = bits.view(torch.uint8)
    bits = bits.view(_BITS[bits.dtype.itemsize]).long()
    places = torch.arange(1, len(bits) + 1, device=bits.device) * 2654435761
    return int((bits * places).sum()) % _EXACT

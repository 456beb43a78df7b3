"""The global batch: what it must look like, and which rows of it this rank works on.

A rank is given the whole batch, or its own rows of it. Data-parallel rank d of M micro-batches of n
rows takes for its micro-batch m the rows [(d*M + m)*n, (d*M + m + 1)*n).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ilm_compile.errors import BatchError
from ilm_compile.program.program import Count, Input
from ilm_compile.runtime.mesh import Axis

Batch = Mapping[str, Tensor]


class LocalBatch(dict[str, Tensor]):
    """A batch that holds the rows of one data-parallel rank alone, as the data loader gives it."""


def says_local(batch: Batch) -> bool:
    """Whether it is known to hold one rank's rows alone."""
    return isinstance(batch, LocalBatch)


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """inputs: each input of one micro-batch, by name; dimension 0 is its rows."""

    inputs: dict[str, Input]
    num_microbatches: int
    dp: Axis

    @property
    def num_slices(self) -> int:
        """Micro-batches of the global batch."""
        return self.num_microbatches * self.dp.size

    def check(self, batch: Batch, *, is_local: bool = False) -> None:
        """Raise `BatchError` unless `batch` has the names, shapes and dtypes compiled for.

        is_local: it shall hold this data-parallel rank's rows alone.
        """
        if set(batch) != set(self.inputs):
            missing = sorted(set(self.inputs) - set(batch))
            unknown = sorted(set(batch) - set(self.inputs))
            raise BatchError(
                f"batch: expected the inputs {sorted(self.inputs)}, got {sorted(batch)}; "
                f"missing {missing}, unknown {unknown}"
            )
        for name, spec in self.inputs.items():
            tensor, rows = batch[name], spec.shape[0]
            num_slices = self.num_microbatches if is_local else self.num_slices
            expected = (rows * num_slices, *spec.shape[1:])
            if tuple(tensor.shape) != expected or tensor.dtype != spec.dtype:
                whole = f"{rows} rows x {self.num_microbatches} micro-batches"
                if is_local:
                    has = f"this rank's part of a batch has {whole}"
                else:
                    has = f"a global batch has {whole} x {self.dp.size} data-parallel ranks"
                raise BatchError(
                    f"batch: expected {name} of shape {expected} and dtype {spec.dtype}, got "
                    f"{tuple(tensor.shape)} and {tensor.dtype}; {has}: "
                    "give it that many, or name its shape in parallelize(..., shapes=[...]) "
                    f"(batch_is_local={not is_local} takes "
                    f"{'all rows' if is_local else 'the rows of this data-parallel rank alone'})"
                )

    def fits(self, batch: Batch, *, is_local: bool = False) -> bool:
        """Whether `check` raises nothing."""
        try:
            self.check(batch, is_local=is_local)
        except BatchError:
            return False
        return True

    def own(self, batch: Batch) -> Batch:
        """This data-parallel rank's rows of a global batch."""
        if self.dp.size == 1:
            return batch
        sizes = {name: self.inputs[name].shape[0] * self.num_microbatches for name in batch}
        return {n: batch[n].narrow(0, self.dp.rank * rows, rows) for n, rows in sizes.items()}

    def split(
        self, own: Batch, names: Iterable[str], device: torch.device
    ) -> dict[str, list[Tensor]]:
        """The named inputs of this rank's micro-batches, on `device`. own: this rank's rows."""
        return {
            name: list(own[name].to(device, non_blocking=True).chunk(self.num_microbatches))
            for name in names
        }

    def dropout_seeds(self, seed: int, step: int) -> list[Tensor]:
        """A seed for each of this rank's micro-batches: a function of its place in the training.

        Not of the plan, so that every plan drops the same elements.
        """
        first = self.dp.rank * self.num_microbatches
        places = range(first, first + self.num_microbatches)
        return [torch.tensor(hash((seed, step, place)) % 2**63) for place in places]

    def count(self, batch: Batch, count: Count) -> Tensor:
        """What `count` adds up to in `batch`, which holds any number of micro-batches.

        On the CPU, in int64 or float64.
        """
        name, rows = next((name, spec.shape[0]) for name, spec in self.inputs.items())
        parts = count.of(batch, len(batch[name]) // rows)
        dtype = torch.float64 if parts[0].is_floating_point() else torch.int64
        return torch.stack([part.to(dtype) for part in parts]).sum(0)

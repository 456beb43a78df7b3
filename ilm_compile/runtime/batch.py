"""The global batch: what it must look like, and which rows of it this rank works on.

Every rank is given the whole batch. Data-parallel rank d of M micro-batches of n rows takes for its
micro-batch m the rows [(d*M + m)*n, (d*M + m + 1)*n).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ilm_compile.errors import BatchError, NoTargetsError
from ilm_compile.program.program import Input
from ilm_compile.runtime.mesh import Axis

Batch = Mapping[str, Tensor]


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

    def check(self, batch: Batch) -> None:
        """Raise `BatchError` unless `batch` has the names, shapes and dtypes compiled for."""
        if set(batch) != set(self.inputs):
            missing = sorted(set(self.inputs) - set(batch))
            unknown = sorted(set(batch) - set(self.inputs))
            raise BatchError(
                f"batch: expected the inputs {sorted(self.inputs)}, got {sorted(batch)}; "
                f"missing {missing}, unknown {unknown}"
            )
        for name, spec in self.inputs.items():
            tensor, rows = batch[name], spec.shape[0]
            expected = (rows * self.num_slices, *spec.shape[1:])
            if tuple(tensor.shape) != expected or tensor.dtype != spec.dtype:
                raise BatchError(
                    f"batch: expected {name} of shape {expected} and dtype {spec.dtype}, got "
                    f"{tuple(tensor.shape)} and {tensor.dtype}; a global batch has {rows} rows x "
                    f"{self.num_microbatches} micro-batches x {self.dp.size} data-parallel ranks: "
                    "give it that many, or name its shape in parallelize(..., shapes=[...])"
                )

    def fits(self, batch: Batch) -> bool:
        """Whether `check` raises nothing."""
        try:
            self.check(batch)
        except BatchError:
            return False
        return True

    def own(self, batch: Batch, name: str) -> Tensor:
        """This data-parallel rank's rows of one input."""
        rows = self.inputs[name].shape[0] * self.num_microbatches
        return batch[name].narrow(0, self.dp.rank * rows, rows)

    def split(
        self, batch: Batch, names: Iterable[str], device: torch.device
    ) -> dict[str, list[Tensor]]:
        """The named inputs of this rank's micro-batches, on `device`."""
        return {
            name: list(
                self.own(batch, name).to(device, non_blocking=True).chunk(self.num_microbatches)
            )
            for name in names
        }

    def dropout_seeds(self, seed: int, step: int) -> list[Tensor]:
        """A seed for each of this rank's micro-batches: a function of its place in the training.

        Not of the plan, so that every plan drops the same elements.
        """
        first = self.dp.rank * self.num_microbatches
        places = range(first, first + self.num_microbatches)
        return [torch.tensor(hash((seed, step, place)) % 2**63) for place in places]

    def count_targets(self, batch: Batch, graph: fx.GraphModule) -> int:
        """The number of loss targets in the global batch, which every rank counts for itself."""
        names = [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]
        columns = [batch[name].cpu().chunk(self.num_slices) for name in names]
        total = sum(int(graph(*arguments)) for arguments in zip(*columns, strict=True))
        if total == 0:
            raise NoTargetsError(
                f"batch: expected at least one target token, got none in {names}: every label is "
                "ignored, so the loss is 0/0; leave such batches out"
            )
        return total

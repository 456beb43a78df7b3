"""What the stages of a rank are given in a step: rows of the batch, counts, dropout seeds.

The one place where this is put together, for training and for the emulation of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ilm_compile.errors import NoTargetsError
from ilm_compile.program.dropout import SEED
from ilm_compile.program.loss import NUM_TARGETS, counting_dtype
from ilm_compile.program.lowered import LoweredProgram, Stage
from ilm_compile.program.program import Count
from ilm_compile.runtime.batch import Batch, BatchLayout
from ilm_compile.runtime.mesh import Axis


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one rank's stages.

    names: those that are rows of the batch. dtype: of counts and of the global loss.
    """

    layout: BatchLayout
    names: frozenset[str]
    target_counts: Mapping[str, Count]
    seed: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(
        cls,
        lowered: LoweredProgram,
        stages: Iterable[Stage],
        *,
        num_microbatches: int,
        dp: Axis,
        device: torch.device,
    ) -> StepInputs:
        """Those of the rank that runs `stages`, at place `dp` of the data-parallel axis."""
        used = {name for stage in stages for name in stage.batch_inputs}
        return cls(
            BatchLayout(lowered.inputs, num_microbatches, dp),
            frozenset(used - set(lowered.target_counts) - {SEED}),
            lowered.target_counts,
            lowered.plan.seed,
            counting_dtype(lowered.variables.values()),
            device,
        )

    def count(self, rows: Batch) -> dict[str, Tensor]:
        """What is counted in these rows of a batch, such as the targets of each loss."""
        return {n: self.layout.count(rows, c) for n, c in self.target_counts.items()}

    def nothing(self) -> dict[str, Tensor]:
        """What `count` gives, with zeros."""
        rows = {n: torch.zeros(i.shape, dtype=i.dtype) for n, i in self.layout.inputs.items()}
        return {name: torch.zeros_like(value) for name, value in self.count(rows).items()}

    def of_step(self, batch: Batch, step: int) -> dict[str, list[Tensor]]:
        """`of_rows` of a global batch, whose targets are counted here."""
        return self.of_rows(self.layout.own(batch), self.count(batch), step)

    def of_rows(
        self, own: Batch, counts: Mapping[str, Tensor], step: int
    ) -> dict[str, list[Tensor]]:
        """For each input a tensor per micro-batch, of this rank's own rows.

        counts: of the global batch. step: how many training steps came before.
        Raises `NoTargetsError` for a batch without targets.
        """
        layout = self.layout
        inputs = layout.split(own, self.names, self.device)
        for name, count in self.target_counts.items():
            total = counts[name]
            if name.startswith(NUM_TARGETS) and not total.any():
                raise NoTargetsError(
                    f"batch: expected at least one target token, got none in {list(count.inputs)}: "
                    "every label is ignored, so the loss is 0/0; leave such batches out"
                )
            if count.weight:
                total = total.double() * float(layout.num_slices) ** count.weight
            dtype = self.dtype if total.is_floating_point() else total.dtype
            inputs[name] = [total.to(self.device, dtype)] * layout.num_microbatches
        # Of a micro-batch's place in the training, not in the plan.
        inputs[SEED] = layout.dropout_seeds(self.seed, step)
        return inputs

    def loss_gradient(self, scale: float = 1.0) -> float:
        """What the backward of each micro-batch starts from: its share of the mean."""
        return scale / self.layout.num_slices

    def share_of_loss(self, losses: Sequence[Tensor]) -> Tensor:
        """What these micro-batches add to the loss of the global batch: a float64 scalar."""
        if not losses:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack(list(losses)).double().sum() / self.layout.num_slices

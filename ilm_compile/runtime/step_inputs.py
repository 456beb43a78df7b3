"""What the stages of a rank are given in a step: rows of the batch, target counts, dropout seeds.

The one place where this is put together, for training and for the emulation of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ilm_compile.errors import NoTargetsError
from ilm_compile.program.dropout import SEED
from ilm_compile.program.lowered import LoweredProgram, Stage
from ilm_compile.program.program import Variable
from ilm_compile.runtime.batch import Batch, BatchLayout, names_of
from ilm_compile.runtime.mesh import Axis


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one rank's stages.

    names: those that are rows of the batch. dtype: of counts and of the global loss.
    """

    layout: BatchLayout
    names: frozenset[str]
    target_counts: Mapping[str, fx.GraphModule]
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
            _counting_dtype(lowered.variables.values()),
            device,
        )

    def count(self, rows: Batch) -> dict[str, int]:
        """How many targets of each loss there are in these rows of a batch."""
        return {n: self.layout.count_targets(rows, g) for n, g in self.target_counts.items()}

    def of_step(self, batch: Batch, step: int) -> dict[str, list[Tensor]]:
        """`of_rows` of a global batch, whose targets are counted here."""
        return self.of_rows(self.layout.own(batch), self.count(batch), step)

    def of_rows(self, own: Batch, counts: Mapping[str, int], step: int) -> dict[str, list[Tensor]]:
        """For each input a tensor per micro-batch, of this rank's own rows.

        counts: of the targets in the global batch. step: how many training steps came before.
        Raises `NoTargetsError` for a batch without targets.
        """
        layout = self.layout
        inputs = layout.split(own, self.names, self.device)
        for name, graph in self.target_counts.items():
            if counts[name] == 0:
                raise NoTargetsError(
                    f"batch: expected at least one target token, got none in {names_of(graph)}: "
                    "every label is ignored, so the loss is 0/0; leave such batches out"
                )
            share = counts[name] / layout.num_slices
            tensor = torch.tensor(share, dtype=self.dtype, device=self.device)
            inputs[name] = [tensor] * layout.num_microbatches
        # Of a micro-batch's place in the training, not in the plan.
        inputs[SEED] = layout.dropout_seeds(self.seed, step)
        return inputs

    def loss_gradient(self, scale: float = 1.0) -> float:
        """What the backward of each micro-batch starts from: its share of the mean."""
        return scale / self.layout.num_slices

    def share_of_loss(self, losses: Sequence[Tensor]) -> Tensor:
        """What these micro-batches add to the loss of the global batch: a float64 scalar."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if losses:
            total += torch.stack(list(losses)).double().sum() / self.layout.num_slices
        return total


def _counting_dtype(variables: Iterable[Variable]) -> torch.dtype:
    """float32 at least: bfloat16 cannot hold the number 257."""
    dtypes = {variable.dtype for variable in variables if variable.is_parameter}
    return torch.float64 if torch.float64 in dtypes else torch.float32

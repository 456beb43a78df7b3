"""InternEvo's Trainer: the same steps with its arguments and results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

from torch import Tensor

from ilm_compile.runtime import Trainer as OurTrainer

GROUP = "0_default"  # the one group of parameters, whose norm is that of all
Output = tuple[Any, Tensor | None, Tensor | None]


class Trainer:
    """`train`, `zero_grad`, `execute_schedule` and `step` as InternEvo has them.

    trainer: ours, which does the work and has the rest: `fit`, hooks, state.
    """

    def __init__(self, trainer: OurTrainer) -> None:
        self.trainer = trainer

    @property
    def uses_pipeline(self) -> bool:
        return self.trainer.parallel.mesh.pp.size > 1

    def train(self) -> Self:
        """Switch to training: dropout on."""
        self.trainer.train()
        return self

    def eval(self) -> Self:
        """Switch to evaluation: dropout off."""
        self.trainer.eval()
        return self

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.trainer.zero_grad()

    def execute_schedule(
        self,
        data_iter: Mapping[str, Tensor] | Iterator[Mapping[str, Tensor]],
        *,
        forward_only: bool = False,
        return_loss: bool = True,
        return_output_label: bool = True,
    ) -> Output:
        """(output, label, loss) of a batch, or of the next one of an iterator.

        output, label: of this data-parallel rank's rows, on the last pipeline stage alone, and
        None unless `return_output_label`. loss: equal on all ranks, None unless `return_loss`.
        """
        batch = data_iter if isinstance(data_iter, Mapping) else next(data_iter)
        result = self.trainer.execute_schedule(
            batch,
            forward_only=forward_only,
            return_loss=return_loss,
            return_output_label=return_output_label,
        )
        return result if isinstance(result, tuple) else (None, None, result)

    def step(self) -> tuple[bool, dict[str, float]]:
        """Whether the parameters were updated, and the gradient norm before clipping."""
        norm = self.trainer.step()
        return math.isfinite(norm), {GROUP: norm}

"""Activation checkpointing: blocks that keep their inputs only and run again in backward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor
from typing import ClassVar

from ilm_compile.errors import PlanError
from ilm_compile.passes.base import Pass
from ilm_compile.program.program import Program

# Lets 0.29 * 100 count as 29 although it is 28.999999999999996 in floating point.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpoint(Pass):
    """Mark a `fraction` of the transformer blocks for recompute (True: all, False: none).

    The marked blocks are spread evenly over the depth, so that each pipeline stage gets its share.
    What lies before and after the blocks is never recomputed. selective: they are marked for
    `SelectiveRecompute`, which runs again what is cheap of them. Preserves numerics
    bit for bit: the random state is restored for blocks with dropout.
    """

    name: ClassVar[str] = "activation-checkpoint"
    ensures: ClassVar[frozenset[str]] = frozenset({"checkpointed"})

    fraction: bool | float
    selective: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise PlanError(
                f"{self.name}: fraction must be False, True or a number in [0, 1], "
                f"got {self.fraction!r}"
            )

    def apply(self, program: Program) -> None:
        blocks = [index for index, region in enumerate(program.regions) if region.is_block]
        marked = [index for i, index in enumerate(blocks) if self._quota(i + 1) > self._quota(i)]
        for index in marked:
            program.regions[index] = replace(
                program.regions[index], recompute=not self.selective, selective=self.selective
            )
        part = ", in part" if self.selective else ""
        program.decisions.append(
            f"{self.name}: {len(marked)} of {len(blocks)} blocks are computed again in backward"
            f"{part} (fraction {float(self.fraction):g})"
        )

    def _quota(self, num_blocks: int) -> int:
        """How many of the first `num_blocks` blocks are marked."""
        return floor(num_blocks * self.fraction + _ROUNDING)

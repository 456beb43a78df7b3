"""Selective recompute: blocks that keep products and attention, and run the cheap rest again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ilm_compile.cost.saved import SavedMemory
from ilm_compile.passes.base import Pass
from ilm_compile.program.boundaries import stage_parts
from ilm_compile.program.program import Program
from ilm_compile.program.remade import AGAIN
from ilm_compile.rewrite.selective import mark_again


@dataclass(frozen=True, kw_only=True)
class SelectiveRecompute(Pass):
    """Mark what runs again in the backward of blocks that are to be recomputed in part.

    Results of products, attention and collectives, integers and what draws random numbers are
    kept, or made from nothing that is not. Of the rest, what a minimum cut finds cheapest: a value
    costs its bytes, a call the bytes it moves over `ilm_compile.rewrite.selective.PRICE`. Which
    blocks is decided by `ActivationCheckpoint` or `ChooseStages`. Preserves numerics bit for bit.
    """

    name: ClassVar[str] = "selective-recompute"
    after: ClassVar[frozenset[str]] = frozenset(
        {"fused", "sharded", "cast", "masters", "checkpointed", "split", "placed", "residuals"}
    )

    def apply(self, program: Program) -> None:
        memory = SavedMemory(program)
        for _, region, nodes in stage_parts(program):
            if program.regions[region].selective:
                mark_again(memory, nodes, program.plan.axes)
        blocks = [region for region in program.regions if region.is_block]
        again = sum(AGAIN in node.meta for node in program.calls())
        program.decisions.append(
            f"{self.name}: {sum(block.selective for block in blocks)} of {len(blocks)} blocks keep "
            f"products, attention and what was sent, and run {again} calls again in backward"
        )

"""Placement of the pipeline stages on the pipeline ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ilm_compile.errors import PlanError
from ilm_compile.passes.base import Pass
from ilm_compile.program.program import Program


@dataclass(frozen=True, kw_only=True)
class Interleave(Pass):
    """Place stage s on rank s % pp, as its chunk s // pp, and write it into the program's plan.

    With several chunks per rank the pipeline fills faster: its bubble shrinks by `num_chunks`
    (Megatron-LM, arXiv:2104.04473, section 2.2). Preserves numerics bit for bit.
    """

    name: ClassVar[str] = "interleave"
    requires: ClassVar[frozenset[str]] = frozenset({"split"})
    ensures: ClassVar[frozenset[str]] = frozenset({"placed"})

    pp: int
    num_chunks: int = 1

    def __post_init__(self) -> None:
        if self.pp < 1 or self.num_chunks < 1:
            raise PlanError(
                f"{self.name}: pp and num_chunks must be positive, got pp={self.pp}, "
                f"num_chunks={self.num_chunks}"
            )

    def apply(self, program: Program) -> None:
        num_stages = 1 + max(node.meta.get("stage", 0) for node in program.calls())
        if num_stages != self.pp * self.num_chunks:
            raise PlanError(
                f"{self.name}: pp * num_chunks = {self.pp} * {self.num_chunks} needs "
                f"{self.pp * self.num_chunks} stages, but the program was split into {num_stages}; "
                f"use PipelineSplit(num_stages={self.pp * self.num_chunks})"
            )
        program.plan = program.plan.replace(pp=self.pp, num_chunks=self.num_chunks)
        for rank in range(self.pp):
            stages = ", ".join(str(stage) for stage in range(rank, num_stages, self.pp))
            program.decisions.append(f"{self.name}: pipeline rank {rank} runs stages {stages}")

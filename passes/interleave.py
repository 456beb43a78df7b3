"""Placement of the pipeline stages on the pipeline ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ilm_compile.errors import PlanError
from ilm_compile.passes.base import Pass
from ilm_compile.program.program import Program
from ilm_compile.schedule import stage_ranks


@dataclass(frozen=True, kw_only=True)
class Interleave(Pass):
    """Place stage s on rank s % pp, as its chunk s // pp, and write it into the program's plan.

    schedule: one whose placement is taken instead, as `zb_v`'s, whose ranks r have the stages r and
    2 pp - 1 - r.

    With several chunks per rank the pipeline fills faster: its bubble shrinks by `num_chunks`
    (Megatron-LM, arXiv:2104.04473, section 2.2). Preserves numerics bit for bit.
    """

    name: ClassVar[str] = "interleave"
    requires: ClassVar[frozenset[str]] = frozenset({"split"})
    ensures: ClassVar[frozenset[str]] = frozenset({"placed"})

    pp: int
    num_chunks: int = 1
    schedule: str | None = None

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
        if self.schedule is not None:
            program.stage_ranks = stage_ranks(self.schedule, pp=self.pp, num_stages=num_stages)
        for rank in range(self.pp):
            own = (stage for stage in range(num_stages) if program.rank_of(stage) == rank)
            stages = ", ".join(map(str, own))
            program.decisions.append(f"{self.name}: pipeline rank {rank} runs stages {stages}")

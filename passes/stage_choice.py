"""Pipeline split and activation checkpointing decided together, within the memory of a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from ilm_compile.cost import hardware_named
from ilm_compile.errors import PlanError
from ilm_compile.passes.pipeline_split import PipelineSplit
from ilm_compile.program.byte_sizes import shown_bytes
from ilm_compile.program.program import Program
from ilm_compile.rewrite.stage_choice import IN_PART, WHOLE, Chooser, StageChoice
from ilm_compile.rewrite.stage_units import stage_units
from ilm_compile.schedule import build


@dataclass(frozen=True, kw_only=True)
class ChooseStages(PipelineSplit):
    """Cut into stages and mark blocks for recompute, so that the simulated step is shortest.

    Stands for `PipelineSplit` and `ActivationCheckpoint` where the plan says checkpoint="auto".
    Every rank recomputes as little as makes it fit into `memory` bytes (None: what `hardware` has),
    with its parameters, gradients and Adam's state under the plan's dp and zero; where the cuts lie
    is tried out on the schedule itself. What is meant to fit is what tensors take: leave room for
    the allocator and for what other libraries hold. Raises `PlanError`, with the bytes that are
    missing, if the plan does not fit with every block recomputed. Preserves numerics bit for bit.
    """

    name: ClassVar[str] = "choose-stages"
    after: ClassVar[frozenset[str]] = frozenset({"sharded", "cast"})
    ensures: ClassVar[frozenset[str]] = frozenset({"split", "checkpointed"})

    pp: int
    num_chunks: int = 1
    num_microbatches: int = 1
    schedule: str = "1f1b"
    memory: int | None = None

    def choose_cuts(
        self, program: Program, calls: Sequence[fx.Node], seconds: list[float]
    ) -> list[int]:
        """Choose both, mark the blocks, and return the cuts."""
        edges = [0, *self.candidates(program, calls, seconds)]
        found = self.chooser(program, calls, edges).best()
        if found.too_much:
            raise PlanError(
                f"{self.name}: a rank needs {shown_bytes(self.usable + found.too_much)} with every "
                f"block recomputed, and has {shown_bytes(self.usable)}; divide the model further "
                "(tp, pp, zero=3 over dp), or make the micro-batch smaller"
            )
        for index, way in found.ways.items():
            program.regions[index] = replace(
                program.regions[index], recompute=way == WHOLE, selective=way == IN_PART
            )
        seconds[:] = self._seconds(program, calls)
        self._tell(program, found)
        return [edges[unit] for unit in found.cuts]

    def chooser(self, program: Program, calls: Sequence[fx.Node], edges: Sequence[int]) -> Chooser:
        """Return what chooses among stages that begin at some of these positions in `calls`."""
        return Chooser(
            stage_units(program, calls, edges, hardware_named(self.hardware)),
            lambda count: build(
                self.schedule, pp=self.pp, num_microbatches=count, num_chunks=self.num_chunks
            ),
            num_microbatches=self.num_microbatches,
            memory=self.usable,
        )

    @property
    def usable(self) -> int:
        """The bytes that a rank may fill."""
        return self.memory or hardware_named(self.hardware).usable_bytes

    def _tell(self, program: Program, found: StageChoice) -> None:
        blocks = [region.name for region in program.regions if region.is_block]
        program.decisions.append(
            f"{self.name}: {len(found.recomputed)} of {len(blocks)} blocks are computed again in "
            f"backward, {list(found.ways.values()).count(IN_PART)} of them in part, so that each "
            f"rank stays within {shown_bytes(self.usable)}; the simulated step takes "
            f"{found.seconds * 1e3:.3f} ms"
        )
        peaks = ", ".join(map(shown_bytes, found.peaks))
        program.decisions.append(f"{self.name}: predicted peaks of the pipeline ranks: {peaks}")

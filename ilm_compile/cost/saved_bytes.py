"""The bytes that autograd keeps for the backward of one micro-batch, by stage and region.

What `ilm_compile.runtime.observe.SavedBytes` counts in a running step, to the byte: every storage
once a stage, where it is saved first, but no parameter, no buffer and nothing of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

from ilm_compile.cost.saved import SavedMemory, Storage
from ilm_compile.program.boundaries import stage_parts
from ilm_compile.program.program import Program

Place = tuple[int, int]  # a stage, and a region by its index in `Program.regions`


class RegionBytes(NamedTuple):
    """Of one micro-batch: what is kept for its backward, and what that makes again beside it."""

    kept: int
    again: int


def saved_bytes(program: Program) -> dict[Place, int]:
    """Return the bytes that each region of each stage keeps: see `region_bytes`."""
    return {place: each.kept for place, each in region_bytes(program).items()}


def region_bytes(program: Program) -> dict[Place, RegionBytes]:
    """Return what each region of each stage keeps and makes again, on one rank, in graph order.

    A region that is recomputed keeps its inputs; of one that is in part, what that starts from is
    kept too. What passes between stages is counted where it is
    saved. Raises `ProgramError` for a program that `lower` would refuse.
    """
    memory = SavedMemory(program)
    found: dict[Place, RegionBytes] = {}
    seen: set[tuple[int, Storage]] = set()
    for stage, region, nodes in stage_parts(program):
        kept = {(stage, s) for s in memory.kept_by(nodes, program.regions[region])}
        again = {(stage, s) for s in memory.of(nodes)} - kept - seen
        before = found.get((stage, region), RegionBytes(0, 0))
        found[stage, region] = RegionBytes(
            before.kept + sum(s.num_bytes for _, s in kept - seen),
            before.again + sum(s.num_bytes for _, s in again),
        )
        seen |= kept
    return found

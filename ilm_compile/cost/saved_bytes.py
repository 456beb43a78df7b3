"""The bytes that autograd keeps for the backward of one micro-batch, by stage and region.

What `ilm_compile.runtime.observe.SavedBytes` counts in a running step, to the byte: every storage
once a stage, where it is saved first, but no parameter, no buffer and nothing of the batch.
"""

from __future__ import annotations

from itertools import groupby

from ilm_compile.cost.saved import SavedMemory
from ilm_compile.program.boundaries import stage_of
from ilm_compile.program.program import Program

Place = tuple[int, int]  # a stage, and a region by its index in `Program.regions`


def saved_bytes(program: Program) -> dict[Place, int]:
    """Return the bytes that each region of each stage keeps, on one rank, in graph order.

    A region that is recomputed keeps its inputs. What passes between stages is counted where it is
    saved. Raises `ProgramError` for a program that `lower` would refuse.
    """
    stages = stage_of(program)
    memory = SavedMemory(program)
    found: dict[Place, int] = {}
    seen: set[object] = set()
    for where, group in groupby(stages, lambda node: (stages[node], node.meta["region"])):
        nodes = list(group)
        is_recomputed = program.regions[where[1]].recompute
        kept = memory.inputs_of(nodes) if is_recomputed else memory.of(nodes)
        for storage in kept:
            if (where[0], storage) not in seen:
                seen.add((where[0], storage))
                found[where] = found.get(where, 0) + storage.num_bytes
        found.setdefault(where, 0)
    return found

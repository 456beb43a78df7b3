"""Whether the small model that a proof steps stands for the big one: block by block, op by op.

The search may place a small model's values in another way than a big one's, and a pass may treat a
block of the big model in its own way. So the blocks of the program that would be launched are
compared with those of the program that was stepped: same ops, same placements, wired the same; only
sizes and casts may differ (a step is taken in float64, where casts vanish).
"""

from __future__ import annotations

import torch
from torch import fx

from ilm_compile.program.collectives import redistribute
from ilm_compile.program.placement import Placement
from ilm_compile.program.program import Program

CAST = torch.ops.aten.to.dtype
OUTSIDE = (-1, 0)  # the position of a value that no region makes


def uncovered(program: Program, small: Program) -> list[str]:
    """Return the names of the regions of `program` that are like no region of `small`."""
    known = set(_signatures(small).values())
    return [name for name, signature in _signatures(program).items() if signature not in known]


def _signatures(program: Program) -> dict[str, str]:
    """Return the text of each region without sizes, by the region's name."""
    lines: dict[int, list[str]] = {}
    position: dict[fx.Node, tuple[int, int]] = {}
    for node in program.calls():
        if node.target is CAST:
            continue
        region = lines.setdefault(node.meta["region"], [])
        position[node] = node.meta["region"], len(region)
        region.append(_line(program, node, position))
    return {program.regions[index].name: "\n".join(text) for index, text in lines.items()}


def _line(program: Program, node: fx.Node, position: dict[fx.Node, tuple[int, int]]) -> str:
    region = node.meta["region"]

    def source(value: fx.Node) -> str:
        while value.target is CAST:
            (value,) = value.all_input_nodes
        kind = _placement(value.meta.get("placement"))
        if value.op == "get_attr":
            return f"{str(value.target).rsplit('.', 1)[-1]}:{kind}"
        where, index = position.get(value, OUTSIDE)
        return f"{index}:{kind}" if where == region else f"outside:{kind}"

    name = getattr(node.target, "__name__", str(node.target))
    words = [name, _placement(node.meta.get("placement"))]
    words += [source(value) for value in node.all_input_nodes]
    if node.target is redistribute:
        words += [_placement(Placement.parse(str(node.kwargs[key]))) for key in ("src", "dst")]
    return " ".join(words)


def _placement(placement: Placement | None) -> str:
    if placement is None:
        return "I"
    return f"S({placement.dim})" if placement.is_shard else placement.kind


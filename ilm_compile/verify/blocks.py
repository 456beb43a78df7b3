"""Whether the small model that a proof steps stands for the big one: block by block, op by op.

The search may place a small model's values in another way than a big one's, and a pass may treat a
block of the big model in its own way. So the blocks of the program that would be launched are
compared with those of the program that was stepped: same ops, same placements, same collectives,
wired the same. Sizes may differ, and casts, which vanish in float64; and so may the side of a
reshape on which a collective stands, which the search is free to choose.
"""

from __future__ import annotations

import torch
from torch import fx

from ilm_compile.program.collectives import redistribute
from ilm_compile.program.placement import Placement
from ilm_compile.program.program import Program

aten = torch.ops.aten
CAST = aten.to.dtype
VIEWS = {
    *(aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default),
    *(aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.slice.Tensor),
}
OUTSIDE = (-1, 0)  # the position of a value that no region makes


def uncovered(program: Program, small: Program) -> list[str]:
    """Return the names of the regions of `program` that are like no region of `small`."""
    known = set(_signatures(small).values())
    return [name for name, signature in _signatures(program).items() if signature not in known]


def _signatures(program: Program) -> dict[str, str]:
    """Return the text of each region without sizes, by the region's name."""
    lines: dict[int, list[str]] = {}
    views: dict[int, list[str]] = {}
    position: dict[fx.Node, tuple[int, int]] = {}
    for node in program.calls():
        region = node.meta["region"]
        if node.target in VIEWS:
            views.setdefault(region, []).append(str(node.target))
        elif node.target is not CAST:
            text = lines.setdefault(region, [])
            position[node] = region, len(text)
            text.append(_line(node, position))
    return {
        program.regions[index].name: "\n".join([*text, *sorted(views.get(index, []))])
        for index, text in lines.items()
    }


def _line(node: fx.Node, position: dict[fx.Node, tuple[int, int]]) -> str:
    name = getattr(node.target, "__name__", str(node.target))
    if node.target is redistribute:
        ends = (Placement.parse(str(node.kwargs[key])) for key in ("src", "dst"))
        types = " -> ".join(end.kind for end in ends)
        return f"{name} {types} {_source(node, node.all_input_nodes[0], position)}"
    inputs = (f"{_source(node, n, position)}:{_placement(n)}" for n in node.all_input_nodes)
    return f"{name} {' '.join(inputs)} -> {_placement(node)}"


def _source(node: fx.Node, value: fx.Node, position: dict[fx.Node, tuple[int, int]]) -> str:
    """Return where `value` comes from: the number of a node in the region of `node`, or a name."""
    while value.target in VIEWS or value.target is CAST:
        value = value.all_input_nodes[0]
    if value.op == "get_attr":
        return str(value.target).rsplit(".", 1)[-1]
    region, index = position.get(value, OUTSIDE)
    return str(index) if region == node.meta["region"] else "outside"


def _placement(node: fx.Node) -> str:
    placement: Placement | None = node.meta.get("placement")
    if placement is None:
        return "I"
    return f"S({placement.dim})" if placement.is_shard else placement.kind

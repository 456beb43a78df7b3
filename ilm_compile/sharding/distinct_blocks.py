"""How many of a model's blocks hold one of each kind: what is true of these is true of all."""

from __future__ import annotations

from collections import defaultdict

from torch import fx

from ilm_compile.program.input_graph import reached
from ilm_compile.program.program import Program
from ilm_compile.sharding.clusters import cluster_nodes


def distinct_blocks(program: Program) -> dict[str, int]:
    """Return, by the path of the list of blocks, how many of its first tell of all the others.

    They hold each kind, and one block that follows on it; {} if those are all. Blocks of a kind
    make the same calls on values of the same shapes, of which the same depend on inputs.
    """
    blocks: dict[str, list[fx.Node]] = defaultdict(list)
    for node in program.calls():
        region = program.regions[node.meta["region"]]
        if region.is_block:
            blocks[region.name].append(node)
    clusters, first = cluster_nodes(program), dict[object, int]()
    placeholders = program.graph.find_nodes(op="placeholder")
    varying = set(reached(placeholders, lambda node: node.users))
    for place, nodes in enumerate(blocks.values()):
        kind = clusters[nodes[0]][0]  # type: ignore[index]
        first.setdefault((kind, *(n in varying for c in nodes for n in c.all_input_nodes)), place)
    count = max(first.values(), default=0) + 2
    paths = {name.rpartition(".")[0] for name in blocks}
    in_order = [name.rpartition(".")[2] for name in blocks] == [*map(str, range(len(blocks)))]
    return {paths.pop(): count} if in_order and len(paths) == 1 and count < len(blocks) else {}

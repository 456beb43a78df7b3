"""Equal nodes of repeated blocks, gathered so that one decision serves all of them.

Two blocks are repeats of each other when they make the same calls on values of the same shapes in
the same order; the n-th nodes of all repeats form one cluster, and so do their parameters. A model
of any depth is thus solved at the size of its distinct blocks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable

from torch import fx

from ilm_compile.program.program import Program
from ilm_compile.program.values import shapes_of

Cluster = Hashable


def cluster_nodes(
    program: Program, mark: Callable[[str], object] = lambda name: None
) -> dict[fx.Node, Cluster]:
    """Return the cluster of every node; nodes outside repeated blocks are alone in theirs.

    Blocks are equal only if `mark` returns the same for their parameters' names.
    """
    clusters: dict[fx.Node, Cluster] = {node: node for node in program.graph.nodes}
    blocks: dict[int, list[fx.Node]] = defaultdict(list)
    for node in program.calls():
        if program.regions[node.meta["region"]].is_block:
            blocks[node.meta["region"]].append(node)
    for region, nodes in blocks.items():
        name = program.regions[region].name
        signature = _signature(nodes, name, mark)
        for position, node in enumerate(nodes):
            clusters[node] = (signature, position)
            for value in node.all_input_nodes:
                if value.op == "get_attr" and all(user in nodes for user in value.users):
                    clusters[value] = (signature, _local(str(value.target), name))
    return clusters


def _local(variable: str, block: str) -> str:
    return variable.removeprefix(block + ".")


def _signature(nodes: list[fx.Node], block: str, mark: Callable[[str], object]) -> int:
    """Return a number that repeats of this block share."""
    position = {node: i for i, node in enumerate(nodes)}
    external: dict[fx.Node, int] = {}

    def token(node: fx.Node) -> str:
        shape = shapes_of(node)
        if node in position:
            return f"%{position[node]}"
        if node.op == "get_attr":
            return f"@{_local(str(node.target), block)}{shape}{mark(str(node.target))}"
        return f"?{external.setdefault(node, len(external))}{shape}"

    rows = []
    for node in nodes:
        args = fx.node.map_arg((node.args, node.kwargs), token)
        rows.append((str(node.target), repr(args), shapes_of(node)))
    return hash(tuple(rows))

"""The part of a graph that the inputs alone decide, as a graph of its own."""

from __future__ import annotations

import torch
from torch import fx, nn


def graph_from_inputs(value: fx.Node) -> fx.GraphModule | None:
    """Return the graph from the inputs to `value`.

    None if it needs parameters or random numbers, or no input.
    """
    needed: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if node.op == "get_attr" or _is_random(node):
            return None
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    if not any(node.op == "placeholder" for node in needed):
        return None
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in value.graph.nodes:
        if node in needed:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[value])
    return fx.GraphModule(nn.Module(), graph)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())

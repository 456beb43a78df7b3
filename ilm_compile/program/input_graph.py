"""The part of a graph that a value needs, as a graph of its own: from the inputs, or from sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from operator import attrgetter

import torch
from torch import fx, nn


def graph_from_inputs(value: fx.Node, besides: Collection[fx.Node] = ()) -> fx.GraphModule | None:
    """Return the graph from the inputs to `value`.

    None if it needs parameters, buffers, random numbers or a node of `besides`, or no input.
    """
    found = graph_to(value, lambda n: _is_variable(n) or _is_random(n) or n in besides)
    return found if found and found.graph.find_nodes(op="placeholder") else None


def graph_to(value: fx.Node, is_refused: Callable[[fx.Node], bool]) -> fx.GraphModule | None:
    """Return the graph of all that `value` needs, itself included; None if any of it is refused."""
    needed: set[fx.Node] = set()
    pending = [value]
    while pending:
        node = pending.pop()
        if is_refused(node):
            return None
        if node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in value.graph.nodes:
        if node in needed:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[value])
    return fx.GraphModule(value.graph.owning_module or nn.Module(), graph)


def _is_variable(node: fx.Node) -> bool:
    """Constants of the graph, unlike what the model holds, have their values in it."""
    if node.op != "get_attr":
        return False
    owner = node.graph.owning_module
    return owner is None or bool(attrgetter(str(node.target))(owner).is_meta)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())

"""The part of a graph that a value needs, as a graph of its own: from the inputs, or from sizes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from torch import fx, nn

from ilm_compile.program.attributes import tensor_at


def graph_from_inputs(value: fx.Node, besides: Collection[fx.Node] = ()) -> fx.GraphModule | None:
    """Return the graph from the inputs to `value`.

    None if it needs parameters, buffers, random numbers or a node of `besides`, or no input.
    """
    found = graph_to(value, lambda n: _is_variable(n) or _is_random(n) or n in besides)
    return found if found and found.graph.find_nodes(op="placeholder") else None


def graph_to(value: fx.Node, is_refused: Callable[[fx.Node], bool]) -> fx.GraphModule | None:
    """Return the graph of all that `value` needs, itself included; None if any of it is refused."""
    needed: set[fx.Node] = set()
    for node in reached([value]):
        if is_refused(node):
            return None
        needed.add(node)
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in value.graph.nodes:
        if node in needed:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(copied[value])
    return fx.GraphModule(value.graph.owning_module or nn.Module(), graph)


def graph_of(
    calls: Iterable[fx.Node], given: Sequence[fx.Node], results: Iterable[fx.Node]
) -> fx.GraphModule:
    """Return the graph that computes `results` by `calls`, in their order, all else being given.

    It has the names of the nodes, and nothing of their meta.
    """
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        values[node] = graph.placeholder(node.name)
    for node in calls:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        values[node] = graph.create_node("call_function", node.target, args, kwargs, node.name)
    graph.output(tuple(values[node] for node in results))
    return fx.GraphModule(nn.Module(), graph)


def reached(
    start: Iterable[fx.Node],
    step: Callable[[fx.Node], Iterable[fx.Node]] = lambda node: node.all_input_nodes,
) -> Iterator[fx.Node]:
    """Yield the nodes of `start` and all that a `step` from one of them leads to, each once."""
    pending = list(dict.fromkeys(start))
    found = set(pending)
    while pending:
        node = pending.pop()
        yield node
        new = [n for n in dict.fromkeys(step(node)) if n not in found]
        found.update(new)
        pending += new


def _is_variable(node: fx.Node) -> bool:
    """Constants of the graph, unlike what the model holds, have their values in it."""
    if node.op != "get_attr":
        return False
    owner = node.graph.owning_module
    return owner is None or tensor_at(owner, str(node.target)).is_meta


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())

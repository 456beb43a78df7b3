"""A region in parts: those of fixed sizes, and those whose sizes the batch decides.

Rows that are sent to their experts are as many as were routed there. What computes with such rows,
and what moves them, runs as it is written; all else of the region lies before or behind it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from ilm_compile.ops.nodes import is_view
from ilm_compile.program.expert_rows import grouped_product, route
from ilm_compile.program.input_graph import graph_of
from ilm_compile.program.layout import layout_of
from ilm_compile.program.weight_parts import left_by

_READS_VALUES = (route, grouped_product)  # how many rows there are is in a tensor
_RAGGED = "DE"  # placements of which the batch decides how many rows there are
_WORTHWHILE = 2  # calls that compute something: one alone is as fast by itself


@dataclass(frozen=True, slots=True)
class Part:
    """Some calls of a region. is_static: they are worth compiling, and can be."""

    graph_module: fx.GraphModule
    inputs: list[fx.Node]
    results: list[fx.Node]
    is_static: bool


def parts_of(lifted: fx.GraphModule, origins: dict[str, fx.Node]) -> list[Part] | None:
    """Return the parts of a region in the order in which they run; None if all sizes are fixed.

    lifted: the graph, all of whose inputs are given. origins: its nodes, by name, in the region.
    """
    calls = [node for node in lifted.graph.nodes if node.op == "call_function"]
    ragged = {node for node in calls if _is_ragged(origins[node.name])}
    if not ragged:
        return None
    turns: dict[fx.Node, int] = {}  # even for what is static: it waits for no more than it must
    for node in calls:
        before = max((turns[n] for n in node.all_input_nodes if n in turns), default=0)
        turns[node] = before + ((before % 2 == 1) != (node in ragged))
    found = []
    for turn in sorted(set(turns.values())):
        own = {node: None for node in calls if turns[node] == turn}
        inputs = {n: None for node in own for n in node.all_input_nodes if n not in own}
        results = [node for node in own if any(user not in own for user in node.users)]
        computing = [node for node in own if not is_view(origins[node.name])]
        is_static = turn % 2 == 0 and len(computing) >= _WORTHWHILE
        body = graph_of(own, [*inputs], results)
        found.append(Part(body, [*inputs], results, is_static))
    return found


def in_turn(
    lifted: fx.GraphModule, parts: list[Part], runs: Sequence[Callable[..., Any]]
) -> fx.GraphModule:
    """Return the graph of a region that calls `runs`, each for one of its parts."""
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in lifted.graph.find_nodes(op="placeholder"):
        values[node] = graph.placeholder(node.name)
    for part, run in zip(parts, runs, strict=True):
        call = graph.call_function(_function(run), tuple(values[node] for node in part.inputs))
        for place, node in enumerate(part.results):
            values[node] = graph.call_function(operator.getitem, (call, place))
    graph.output(fx.node.map_arg(lifted.graph.output_node().args[0], values.__getitem__))
    return fx.GraphModule(nn.Module(), graph)


def _is_ragged(node: fx.Node) -> bool:
    """Whether a call of a region makes or takes something whose size the batch decides."""
    left = left_by(node.target)
    return (left[1] if left else node.target) in _READS_VALUES or any(
        placement.kind in _RAGGED
        for each in (node, *node.all_input_nodes)
        for _, placement in layout_of(each).placed
    )


def _function(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which may be a method, as what a graph can call."""

    def part(*given: Any) -> Any:
        return run(*given)

    return part

"""Collectives of a compiled region beside its products: a pass over the graph that Inductor gets.

Each collective becomes a start and a wait. It starts as soon as what it sends is there; products
that only lead to results, as those of a weight's gradient do, run while the next one is under way.
Nothing passes a collective that is not in two halves, nor a write into memory, and no collective
passes another: all ranks start theirs in the same order.
(As Megatron-LM's linear layer does by hand: `megatron/core/tensor_parallel/layers.py`.)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ilm_compile.program.collectives import wire_of
from ilm_compile.program.placement import Placement, S
from ilm_compile.program.started import HALVES

aten, ilm = torch.ops.aten, torch.ops.ilm
_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default})
_START, _WAIT, _UNPACKED = HALVES


def overlap(graph: fx.Graph) -> None:
    """The pass. graph: what Inductor has after its own passes, all of its calls without effects."""
    for node in graph.find_nodes(op="call_function", target=ilm.redistribute.default):
        _split(node)
    output = graph.output_node()
    for node in _Order([n for n in graph.nodes if n.op == "call_function"]).done:
        output.prepend(node)


def _split(node: fx.Node) -> None:
    """Put a start, a wait and what is left to do in the place of a collective."""
    x, src, dst, _, backward = node.args
    source, target = Placement.parse(str(src)), Placement.parse(str(dst))
    wire = wire_of(source, target, backward=bool(backward))
    if wire is None:
        return
    shape = list(node.meta["val"].shape)
    with node.graph.inserting_before(node):
        result = received = _call(node.graph, _START, *node.args)
        _call(node.graph, _WAIT, received, x)
        if (target if backward else source) == S(0):
            result = _call(node.graph, aten.view.default, received, shape)
        elif wire.is_unpacked:
            result = _call(node.graph, _UNPACKED, received, *node.args[1:])
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    with node.all_input_nodes[0].meta["val"].fake_mode:
        node.meta["val"] = target(*fx.node.map_arg(args, lambda each: each.meta["val"]))
    return node


class _Order:
    """The calls of a graph, `done`, in an order in which products run beside collectives."""

    def __init__(self, calls: list[fx.Node]) -> None:
        self.done: dict[fx.Node, None] = {}
        self._late: dict[fx.Node, None] = {}  # products that are to run beside the next collective
        self._waits: dict[Any, fx.Node] = {n.args[0]: n for n in calls if n.target is _WAIT}
        self._fences = [n for n in calls if n.target is _START or _is_fence(n)]
        ends = _ends(calls)
        for node in calls:
            is_late = node in ends and (
                node.target in _PRODUCTS or any(n in self._late for n in node.all_input_nodes)
            )
            if is_late:
                self._late[node] = None
            elif node.target is not _WAIT and node not in self.done:
                if _is_fence(node):
                    self._run_late()
                self._run(node)
        self._run_late()
        for node in list(self._waits):
            self._wait(node)
        self._run_late()

    def _run(self, node: fx.Node) -> None:
        """Run a call after what it waits for, and start what can start then."""
        for given in node.all_input_nodes:
            self._wait(given)
        self.done[node] = None
        if self._fences and self._fences[0] is node:
            del self._fences[0]
        if self._fences and self._fences[0].target is _START and self._is_ready(self._fences[0]):
            self._run(self._fences[0])

    def _wait(self, node: fx.Node) -> None:
        """Wait for what `node` receives, if that is under way, and run beside it what can be."""
        if (wait := self._waits.get(node)) is not None:
            self._run_late()
            del self._waits[node]
            self._run(wait)

    def _run_late(self) -> None:
        for node in [*self._late]:
            if self._is_ready(node):
                del self._late[node]
                self._run(node)

    def _is_ready(self, node: fx.Node) -> bool:
        return all(
            n.op != "call_function" or (n in self.done and n not in self._waits)
            for n in node.all_input_nodes
        )


def _ends(calls: list[fx.Node]) -> set[fx.Node]:
    """What leads to results of the graph only, and to no collective."""
    ends: set[fx.Node] = set()
    for node in reversed(calls):
        is_plain = node.target not in (_START, _WAIT) and not _is_fence(node)
        if is_plain and all(user in ends or user.op == "output" for user in node.users):
            ends.add(node)
    return ends


def _is_fence(node: fx.Node) -> bool:
    """Whether nothing may pass a call: it sends as a whole, or writes, or nobody knows."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is not operator.getitem
    if node.target in (_START, _WAIT, _UNPACKED):
        return False
    schema = node.target._schema
    return schema.is_mutable or any(each.name in ("axis", "axes") for each in schema.arguments)

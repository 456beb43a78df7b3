"""One pipeline stage as an nn.Module whose children are its regions."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from ilm_compile.ops.products import leaving_weight
from ilm_compile.program.attributes import put_tensor, tensor_at
from ilm_compile.program.program import Program
from ilm_compile.program.remade import AGAIN, Remade
from ilm_compile.program.weight_parts import recompute_contexts
from ilm_compile.rewrite.parameter_free import is_random


class Recomputed(nn.Module):
    """Runs `body`, keeping its inputs only; backward computes it again.

    A module of its own, so that FSDP can wrap it and gathers the parameters for both runs.
    `is_random`: the body draws random numbers, whose generator must be put back for the second run.
    """

    def __init__(self, body: nn.Module, *, is_random: bool) -> None:
        super().__init__()
        self.body = body
        self.is_random = is_random

    def forward(self, *args: Tensor) -> Any:
        return checkpoint(
            self.body,
            *args,
            use_reentrant=False,
            preserve_rng_state=self.is_random,
            context_fn=recompute_contexts,
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """The part of a stage that becomes one child module."""

    name: str
    nodes: list[fx.Node]
    recompute: bool = False


def build_stage(
    program: Program, segments: list[Segment], received: list[fx.Node], results: list[fx.Node]
) -> tuple[fx.GraphModule, tuple[str, ...], dict[str, str]]:
    """Return the module of a stage, the names of the batch inputs it takes, and its variables.

    The module takes the batch inputs and then the `received` values, runs one child per segment,
    and returns the tuple of `results`. The variables map the user's name to the attribute path.
    """
    builder = _StageBuilder(program, segments, results)
    builder.add_inputs(received)
    for position in range(len(segments)):
        builder.add_segment(position)
    return builder.finish()


@dataclass
class _StageBuilder:
    program: Program
    segments: list[Segment]
    results: list[fx.Node]
    root: nn.Module = field(default_factory=nn.Module)
    graph: fx.Graph = field(default_factory=fx.Graph)
    values: dict[fx.Node, fx.Node] = field(default_factory=dict)  # in the stage's graph
    variables: dict[str, str] = field(default_factory=dict)
    batch_inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Which segments use a value, and which a variable; the results count as one more segment.
        self.users: dict[fx.Node | str, set[int]] = {}
        for position, segment in enumerate(self.segments):
            for node in segment.nodes:
                self._use(node.all_input_nodes, position)
        self._use(self.results, len(self.segments))

    def _use(self, nodes: Iterable[fx.Node], position: int) -> None:
        for node in nodes:
            self.users.setdefault(_key(node), set()).add(position)

    def add_inputs(self, received: list[fx.Node]) -> None:
        """Add the placeholders, and the variables that more than one region uses."""
        for node in self.program.graph.find_nodes(op="placeholder"):
            if node in self.users:
                self.batch_inputs += (str(node.target),)
                self._placeholder(node, str(node.target))
        for node in received:
            self._placeholder(node, node.name)
        for node in self.program.graph.find_nodes(op="get_attr"):
            users = self.users.get(_key(node), set())
            if len(users) > 1 or len(self.segments) in users:
                name = str(node.target)
                # A flat name: every child module of a stage is a region.
                if name not in self.variables:
                    self.variables[name] = path = _free_name(self.root, _identifier(name))
                    put_tensor(self.root, path, _storage(self.program, name))
                self.values[node] = self.graph.create_node("get_attr", self.variables[name])
                self.values[node].meta["val"] = node.meta["val"]

    def _placeholder(self, node: fx.Node, name: str) -> None:
        self.values[node] = self.graph.placeholder(name)
        self.values[node].meta["val"] = node.meta["val"]

    def add_segment(self, position: int) -> None:
        """Add the child module of one segment, its call, and the values it returns."""
        segment = self.segments[position]
        name = _free_name(self.root, _identifier(segment.name))
        used = {source: None for node in segment.nodes for source in node.all_input_nodes}
        inputs = [node for node in used if node in self.values]
        outputs = [n for n in segment.nodes if max(self.users.get(n, {position})) > position]
        body, owned = _region(self.program, name, segment.nodes, inputs, outputs)
        module: nn.Module = body
        if segment.recompute:
            module = Recomputed(body, is_random=any(map(is_random, segment.nodes)))
        elif any(AGAIN in node.meta for node in segment.nodes):
            module = Remade(body)
        self.root.add_module(name, module)
        prefix = name if module is body else f"{name}.body"
        self.variables.update({variable: f"{prefix}.{path}" for variable, path in owned.items()})
        call = self.graph.call_module(name, tuple(self.values[node] for node in inputs))
        for index, node in enumerate(outputs):
            self.values[node] = self.graph.call_function(operator.getitem, (call, index))
            self.values[node].meta["val"] = node.meta["val"]

    def finish(self) -> tuple[fx.GraphModule, tuple[str, ...], dict[str, str]]:
        """Close the graph and return the stage."""
        self.graph.output(tuple(self.values[node] for node in self.results))
        module = fx.GraphModule(self.root, self.graph, "Stage")
        variables = {n: self.variables[n] for n in self.program.variables if n in self.variables}
        return module, self.batch_inputs, variables


def _region(
    program: Program,
    name: str,
    nodes: list[fx.Node],
    inputs: list[fx.Node],
    outputs: list[fx.Node],
) -> tuple[fx.GraphModule, dict[str, str]]:
    """Return the module that computes `nodes`, and where it holds the variables it owns."""
    root, body = nn.Module(), fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    owned: dict[str, str] = {}
    for node in inputs:
        values[node] = body.placeholder(node.name)
        values[node].meta.update({k: node.meta[k] for k in ("val", "layout") if k in node.meta})
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in values:
                variable = str(source.target)
                if variable not in owned:
                    # A flat name: a path costs the host as much as a small op, in each use.
                    owned[variable] = path = _free_name(root, _identifier(variable))
                    put_tensor(root, path, _storage(program, variable))
                values[source] = body.node_copy(source)
                values[source].target = owned[variable]
        values[node] = copied = body.node_copy(node, values.__getitem__)
        if node.meta.get("leaves_weight"):
            copied.target = leaving_weight(node.target)
    body.output(tuple(values[node] for node in outputs))
    return fx.GraphModule(root, body, name), owned


def _key(node: fx.Node) -> fx.Node | str:
    return str(node.target) if node.op == "get_attr" else node


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _storage(program: Program, name: str) -> Tensor:
    """Return the rank-local tensor of a variable: on meta, except for constants of the graph."""
    variable = program.variables[name]
    traced = tensor_at(program.graph_module, name)
    if not traced.is_meta:
        return traced
    shape = variable.layout.local_shape(variable.shape, program.plan.axes)
    value = torch.empty(shape, dtype=variable.dtype, device="meta")
    return nn.Parameter(value, variable.requires_grad) if variable.is_parameter else value


def _free_name(root: nn.Module, name: str) -> str:
    number, free = 1, name
    while hasattr(root, free):
        free, number = f"{name}_{number}", number + 1
    return free

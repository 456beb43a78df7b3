"""Where a program first goes wrong: the node at which its values part from the traced model's.

Both graphs run node by node; nodes that stand in both, recognised by name, are compared as full
tensors. A difference in values is reported at the first node in order, a difference in gradients
alone at the first one that the backward pass reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ilm_compile.program.placement import Placement, join_shards, split_shards
from ilm_compile.program.program import Program
from ilm_compile.sharding.strategy import placement_of
from ilm_compile.verify.threads import run_ranks

Values = dict[str, tuple[Tensor, Tensor | None]]  # by node name: the value and its gradient


@dataclass(frozen=True, slots=True)
class Difference:
    """The first node whose value or gradient differs, and by how much (relative)."""

    node: str
    where: str
    what: str
    error: float

    def __str__(self) -> str:
        return f"the first {self.what} that differs is that of {self.where}, by {self.error:.1e}"


def first_difference(
    traced: Program,
    program: Program,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    tolerance: float,
) -> Difference | None:
    """Return where `program` first differs from `traced` on one micro-batch, None if nowhere.

    `inputs` holds every placeholder, the numbers of targets included.
    """
    expected = _run(traced, 1, model, inputs)
    actual = _run(program, program.plan.tp, model, inputs)
    nodes = [node for node in program.calls() if node.name in expected and node.name in actual]
    for what, index, order in (("value", 0, nodes), ("gradient", 1, nodes[::-1])):
        for node in order:
            error = _error(actual[node.name][index], expected[node.name][index])
            if error > tolerance:
                return Difference(node.name, program.where(node), what, error)
    return None


def _error(actual: Tensor | None, expected: Tensor | None) -> float:
    if actual is None or expected is None or not expected.is_floating_point():
        return 0.0
    if actual.shape != expected.shape:
        return float("inf")
    scale = max(float(expected.norm()), 1e-12)
    return float((actual.double() - expected.double()).norm()) / scale


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every value, and its gradient once the loss was differentiated."""

    def __init__(self, module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.tensors = tensors
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            return self.tensors[str(n.target)]
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            if value.requires_grad:
                value.retain_grad()
            self.seen[n.name] = value
        return value


def _run(program: Program, size: int, model: nn.Module, inputs: Mapping[str, Tensor]) -> Values:
    """Return every node's full value and gradient, gathered over `size` ranks."""
    full = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    full.update(
        {n: b for n, b in program.graph_module.named_buffers() if n not in full and not b.is_meta}
    )
    names = [str(n.target) for n in program.graph.find_nodes(op="placeholder")]

    def rank(index: int) -> dict[str, Tensor]:
        tensors = {}
        for name, tensor in full.items():
            variable = program.variables.get(name)
            place = variable.placement if variable else None
            whole = variable.pad(tensor.detach()) if variable else tensor
            local = split_shards(whole, place, size)[index] if place and place.is_shard else whole
            needs = variable is not None and variable.requires_grad
            tensors[name] = local.detach().clone().requires_grad_(needs)
        recorder = _Recorder(program.graph_module, tensors)
        recorder.run(*(inputs[name] for name in names))[0].backward()
        return recorder.seen

    ranks = run_ranks(size, rank)
    nodes = {node.name: node for node in program.calls()}
    return {name: _gather(nodes[name], [seen[name] for seen in ranks]) for name in ranks[0]}


def _gather(node: fx.Node, parts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    placement = placement_of(node)
    grads = [part.grad for part in parts]
    whole = _join([part.detach() for part in parts], placement, {"P"})
    if any(grad is None for grad in grads):
        return whole, None
    return whole, _join([grad for grad in grads if grad is not None], placement, {"R"})


def _join(parts: list[Tensor], placement: Placement, partial: set[str]) -> Tensor:
    if placement.is_shard:
        return join_shards(parts, placement)
    return torch.stack(parts).sum(0) if placement.kind in partial else parts[0]

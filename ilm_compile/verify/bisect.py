"""Where a program first goes wrong: the node at which its values part from those of another.

The other is the traced model, or the program before a pass. Both graphs run node by node; nodes
that stand in both, recognised by name, are compared as full tensors. A difference in values is
reported at the first node in order, a difference in gradients alone at the first one that the
backward pass reaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.collectives import redistribute
from ilm_compile.program.parameter_map import to_program
from ilm_compile.program.placement import Placement, join_shards, split_shards
from ilm_compile.program.program import Program
from ilm_compile.sharding.strategy import placement_of
from ilm_compile.verify.threads import run_ranks

Parts = list[Tensor]  # by rank
Values = dict[str, tuple[Parts, list[Tensor | None]]]  # by node name: the value and its gradient
TINY = 1e-5  # of all gradients' norm: one that small may be zero in theory, and rounding in fact
FACTOR = 1e-8  # how well a wrong value must be a multiple of the right one to be called one


@dataclass(frozen=True, slots=True)
class Difference:
    """The first node whose value or gradient differs: by how much (relative), and how.

    `how` says what can be told of the wrong value. `beside` lists the nodes next to it that the
    traced graph does not have.
    """

    node: str
    where: str
    what: str
    error: float
    how: str = ""
    beside: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"the first {self.what} that differs is that of {self.where}, by {self.error:.1e}"
        text += f", {self.how}" if self.how else ""
        return text + (f"; next to it stands {', '.join(self.beside)}" if self.beside else "")


def first_difference(
    before: Program,
    after: Program,
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    *,
    tolerance: float,
) -> Difference | None:
    """Return where `after` first differs from `before` on one micro-batch, None if nowhere.

    `tensors` are the full parameters and buffers that `before` was traced with or has; `inputs`
    holds every placeholder, the numbers of targets included.
    """
    expected, actual = _run(before, tensors, inputs), _run(after, tensors, inputs)
    old = {node.name: node for node in before.graph.nodes if node.name in expected}
    nodes = [node for node in after.graph.nodes if node.name in old and node.name in actual]
    floor = TINY * _norm([parts[0] for _, parts in expected.values()])
    for what, index, order in (("value", 0, nodes), ("gradient", 1, nodes[::-1])):
        summed = "P" if what == "value" else "R"
        for node in order:
            theirs = [part for part in expected[node.name][index] if part is not None]
            parts = actual[node.name][index]
            held = [part for part in parts if part is not None]
            if len(theirs) < len(expected[node.name][index]) or len(held) < len(parts):
                continue
            right = _wholes(theirs, placement_of(old[node.name]), summed)[0]
            wholes = _wholes(held, placement_of(node), summed)
            tiny = floor if what == "gradient" else 1e-12
            errors = [_error(whole, right, tiny) for whole in wholes]
            if not max(errors) <= tolerance:
                near = node.all_input_nodes if what == "value" else list(node.users)
                return Difference(
                    node.name,
                    after.where(node),
                    what,
                    max(errors),
                    _how(wholes, errors, right, tolerance),
                    tuple(_describe(n) for n in near if n.name not in expected),
                )
    return None


def loss_of(
    program: Program, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> float:
    """Return the loss of one micro-batch; arguments as for `first_difference`."""
    parts, _ = _run(program, tensors, inputs)[program.outputs[0].name]
    return float(_wholes(parts, placement_of(program.outputs[0]), "P")[0])


def ranks_of(program: Program) -> int:
    """Return on how many tp ranks `program` runs: one until it is sharded."""
    return program.plan.tp if "sharded" in program.facts else 1


def _describe(node: fx.Node) -> str:
    kind = f" {node.kwargs['src']} -> {node.kwargs['dst']}" if node.target is redistribute else ""
    return f"{node.name}{kind}"


def _norm(tensors: list[Tensor | None]) -> float:
    return float(torch.stack([t.norm() for t in tensors if t is not None]).norm())


def _error(actual: Tensor, expected: Tensor, floor: float) -> float:
    actual = _without_padding(actual, expected)
    if actual.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return float((actual != expected).any())
    # where both are infinite, a mask say, they are equal
    difference = torch.where(actual == expected, 0.0, actual.double() - expected.double())
    scale = float(expected[expected.isfinite()].norm())
    return float(difference.norm()) / max(scale, floor)


def _how(wholes: Parts, errors: list[float], expected: Tensor, tolerance: float) -> str:
    """Return what can be told of wrong values: on which rank, of what shape, how many times."""
    worst = errors.index(max(errors))
    words = [f"on tp rank {worst} but not on all"] if min(errors) <= tolerance else []
    actual = _without_padding(wholes[worst], expected)
    if actual.shape != expected.shape:
        words.append(f"it has shape {list(actual.shape)}, expected {list(expected.shape)}")
    elif expected.is_floating_point() and expected.numel() > 1:
        norm = expected.double().square().sum()
        factor = (actual.double() * expected.double()).sum() / norm
        if (actual.double() - factor * expected.double()).norm() < FACTOR * norm.sqrt():
            words.append(f"it is {float(factor):.6g} times what it should be")
    return ", ".join(words)


def _without_padding(actual: Tensor, expected: Tensor) -> Tensor:
    """Return `actual` without the classes that a padded vocabulary adds at the end."""
    if actual.dim() == expected.dim():
        for dim, size in enumerate(expected.shape):
            actual = actual.narrow(dim, 0, min(size, actual.shape[dim]))
    return actual


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every value, and its gradient once the loss was differentiated."""

    def __init__(self, module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.tensors = tensors
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr":
            value = self.seen[n.name] = self.tensors[str(n.target)]
            return value
        value = super().run_node(n)
        if isinstance(value, Tensor) and n.op == "call_function":
            if value.requires_grad:
                value.retain_grad()
            self.seen[n.name] = value
        return value


def _run(program: Program, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Values:
    """Return every node's value and gradient on each rank."""
    size = ranks_of(program)
    made = [each for each in program.parameter_maps if set(each.names()) <= set(tensors)]
    full = to_program(made, tensors)
    full.update(
        {n: b for n, b in program.graph_module.named_buffers() if n not in full and not b.is_meta}
    )
    names = [str(n.target) for n in program.graph.find_nodes(op="placeholder")]

    def rank(index: int) -> dict[str, Tensor]:
        local_tensors = {}
        for name, tensor in full.items():
            variable = program.variables.get(name)
            place = variable.placement if variable else None
            whole = variable.pad(tensor.detach()) if variable else tensor
            local = split_shards(whole, place, size)[index] if place and place.is_shard else whole
            needs = variable is not None and variable.requires_grad
            local_tensors[name] = local.detach().clone().requires_grad_(needs)
        recorder = _Recorder(program.graph_module, local_tensors)
        recorder.run(*(inputs[name] for name in names))[0].backward()
        return recorder.seen

    ranks = run_ranks(size, rank)
    return {
        name: ([seen[name].detach() for seen in ranks], [seen[name].grad for seen in ranks])
        for name in ranks[0]
    }


def _wholes(parts: Parts, placement: Placement, partial: str) -> list[Tensor]:
    """Return the full value: once, or as often as there are ranks if each must have it."""
    if placement.is_shard:
        return [join_shards(parts, placement)]
    return [torch.stack(parts).sum(0)] if placement.kind == partial else parts

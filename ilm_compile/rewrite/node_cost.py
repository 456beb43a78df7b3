"""Seconds of each node in one training step: forward, backward and recompute."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from ilm_compile.cost import Hardware, collective_time, node_time
from ilm_compile.cost.ring import ring_time
from ilm_compile.ops.nodes import value_bytes
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.collectives import TRANSITIONS, WIRE, redistribute
from ilm_compile.program.expert_rows import SENT, route, route_of
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.linear_loss import linear_cross_entropy
from ilm_compile.program.placement import Placement
from ilm_compile.program.program import Program
from ilm_compile.program.query_attention import has_mask, parts_of
from ilm_compile.program.remade import AGAIN


class NodeSeconds(NamedTuple):
    """What one call takes per micro-batch on one device.

    weight: the part of its backward that is for the gradient of a weight, of a product.
    """

    forward: float
    backward: float = 0.0
    weight: float = 0.0


def node_seconds(program: Program, hardware: Hardware) -> dict[fx.Node, NodeSeconds]:
    """Return the seconds of each call; the backward of those that gradients flow through."""
    differentiable = gradient_nodes(program.graph)
    result = {}
    for node in program.calls():
        forward = _seconds(program, node, hardware, backward=False)
        if node not in differentiable:
            result[node] = NodeSeconds(forward)
            continue
        backward = _seconds(program, node, hardware, backward=True)
        # A product's two gradients are as much work as each other.
        weight = backward / 2 if spec_of(node.target).weight_part else 0.0
        result[node] = NodeSeconds(forward, backward - weight, weight)
    return result


def step_seconds(program: Program, hardware: Hardware) -> dict[fx.Node, float]:
    """Return the seconds each call takes per micro-batch, backward included, on one device.

    What is computed again runs forward once more.
    """
    return {
        node: sum(each) + each.forward * runs_again(program, node)
        for node, each in node_seconds(program, hardware).items()
    }


def runs_again(program: Program, node: fx.Node) -> bool:
    """Whether backward runs a call once more."""
    return program.regions[node.meta["region"]].recompute or AGAIN in node.meta


def _seconds(program: Program, node: fx.Node, hardware: Hardware, *, backward: bool) -> float:
    if node.target in (redistribute, route):
        return _collective_seconds(program, node, hardware, backward=backward)
    if node.target is linear_cross_entropy:  # backward makes the logits once more
        x, weight = (source.meta["val"] for source in node.all_input_nodes[:2])
        flops = (3 if backward else 1) * 2 * x.numel() * weight.shape[0]
        return float(flops / hardware.usable_flops(x.dtype)) + hardware.kernel_overhead_s
    if moves := spec_of(node.target).moves:
        return moves(node) / hardware.usable_bandwidth + hardware.kernel_overhead_s
    seconds = node_time(node, hardware, backward=backward)
    return _ring_seconds(node, seconds, hardware, backward=backward)


def _ring_seconds(node: fx.Node, seconds: float, hardware: Hardware, *, backward: bool) -> float:
    """Return the seconds of an attention that takes `seconds`, its messages with it."""
    if parts_of(node) == 1:
        return seconds
    q, k, v = (value.meta["val"] for value in node.args[:3])  # type: ignore[union-attr]
    return ring_time(
        seconds,
        (q.shape, k.shape, v.shape),
        itemsize=k.element_size(),
        is_masked=has_mask(node),
        size=parts_of(node),
        hardware=hardware,
        backward=backward,
    )


def _collective_seconds(
    program: Program, node: fx.Node, hardware: Hardware, *, backward: bool
) -> float:
    kind = _wire(node, backward=backward)
    if kind is None:
        return 0.0
    size = program.plan.axes[str(node.kwargs["axis"])]
    full = max(value_bytes(node), value_bytes(node.all_input_nodes[0]))
    return collective_time(kind, full, size, hardware)


def _wire(node: fx.Node, *, backward: bool) -> str | None:
    """Return which collective a call runs, if any."""
    if node.target is route:
        has_it = node.meta["val"].is_floating_point() or not backward
        return "all_to_all" if has_it and route_of(node) in SENT else None
    source, target = (Placement.parse(str(node.kwargs[name])) for name in ("src", "dst"))
    _, on_value, on_gradient = TRANSITIONS[source.kind, target.kind]
    return WIRE.get(on_gradient if backward else on_value)

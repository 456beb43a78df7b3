"""Seconds of each node in one training step: forward, backward and recompute."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor, fx

from ilm_compile.cost import Hardware, collective_time, node_time
from ilm_compile.cost.data_parallel import software_of
from ilm_compile.cost.ring import pieces_time, ring_time
from ilm_compile.ops.call import axis_of
from ilm_compile.ops.ring_products import multiplied
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.expert_rows import route
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.linear_loss import linear_cross_entropy
from ilm_compile.program.program import Program
from ilm_compile.program.query_attention import has_mask, parts_of
from ilm_compile.program.remade import AGAIN
from ilm_compile.program.ring_products import gather_products
from ilm_compile.program.traffic import PIECES, SENT, traffic

# For which ranks wait that arrive apart: not for a parameter's, which follows another one.
REDUCING = ("all_reduce", "reduce_scatter")
SHIFT = "shift"  # what `ring_time` and `pieces_time` count


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
    sent = _sent_seconds(program, node, hardware, backward=backward)
    if node.target in (redistribute, route):  # a call of the host's in any case
        return sent + hardware.kernel_overhead_s
    if node.target is linear_cross_entropy:  # backward makes the logits once more
        return sent + _loss_seconds(node, hardware, backward=backward)
    if node.target in PIECES:
        return sent + _pieces_seconds(program, node, hardware, backward=backward)
    if moves := spec_of(node.target).moves:
        return sent + moves(node) / hardware.usable_bandwidth + hardware.kernel_overhead_s
    seconds = node_time(node, hardware, backward=backward)
    return sent + _ring_seconds(node, seconds, hardware, backward=backward)


def _pieces_seconds(
    program: Program, node: fx.Node, hardware: Hardware, *, backward: bool
) -> float:
    """Of products beside a collective; in backward with those for the weights, which follow."""
    shapes, val = multiplied(node), PIECES[node.target](node).meta["val"]
    seconds = sum(_product_seconds(x, weight, val, hardware) for x, weight in shapes)
    gathers = node.target is gather_products
    found = pieces_time(
        seconds,
        val.numel() * val.element_size(),
        count=len(shapes),
        size=program.plan.axes[axis_of(node)],
        hardware=hardware,
        sums=gathers == backward,
    )
    found += software_of(hardware).tp_wait_s * (gathers == backward)
    return found + seconds * backward


def _product_seconds(
    x: Sequence[int], weight: Sequence[int], val: Tensor, hardware: Hardware
) -> float:
    rows, (columns, inner) = prod(x[:-1]), weight
    operands = val.element_size() * (rows * inner + columns * inner + rows * columns)
    seconds = 2 * rows * columns * inner / hardware.usable_flops(val.dtype)
    seconds += operands / hardware.operand_bandwidth
    moved = operands / hardware.usable_bandwidth
    return float(max(seconds, moved)) + hardware.kernel_overhead_s


def _loss_seconds(node: fx.Node, hardware: Hardware, *, backward: bool) -> float:
    """Of logits and their loss in pieces: the logits are written and read, and one value more."""
    x, weight = (source.meta["val"] for source in node.all_input_nodes[:2])
    logits, products, values = x.shape[0] * weight.shape[0], 1, 2
    if backward:
        products, values = 3, 3
    operands = products * x.itemsize * (x.numel() + weight.numel() + logits)
    seconds = products * 2 * logits * x.shape[1] / hardware.usable_flops(x.dtype)
    seconds += operands / hardware.operand_bandwidth
    seconds += values * x.itemsize * logits / hardware.usable_bandwidth
    return float(seconds) + hardware.kernel_overhead_s


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


def _sent_seconds(program: Program, node: fx.Node, hardware: Hardware, *, backward: bool) -> float:
    """Return the seconds of the collectives that a call runs, but for those of a ring."""
    plan, seconds = program.plan, 0.0
    for message in traffic(node, plan.axes):
        if message.backward != backward or message.kind == SHIFT:
            continue
        axis = str(node.kwargs.get("axis") or node.args[-1])
        stride, size = {"tp": 1, "cp": plan.tp}.get(axis, plan.cp * plan.tp), plan.axes[axis]
        full = message.num_bytes / SENT[message.kind](size)
        seconds += collective_time(message.kind, full, size, hardware, stride=stride)
        if axis == "tp" and message.kind in REDUCING and node.all_input_nodes[0].op != "get_attr":
            seconds += software_of(hardware).tp_wait_s
    return seconds

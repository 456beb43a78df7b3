"""Floating-point operations of a node, forward and backward.

Conventions. A multiply-add is 2 FLOPs. Only products of matrices and convolutions count: every op
whose spec has none does 0 FLOPs, being limited by the bytes it moves
(`ilm_compile.cost.roofline`). Causal attention counts the half of the score matrix that a causal
kernel computes, 2 b s^2 h, not the full 4 b s^2 h of the PaLM and Megatron convention; with an
explicit mask nothing is known of its zeros, and attention counts in full. Backward is 2x forward:
what a fused attention kernel computes again of its own forward is not counted, nor is activation
checkpointing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import fx

from ilm_compile.ops.spec import spec_of
from ilm_compile.program.gradients import gradient_nodes


def forward_flops(node: fx.Node) -> int:
    """Return the FLOPs of one run of `node`, of shapes as in ``node.meta["val"]``."""
    flops = spec_of(node.target).flops
    return flops.forward(node) if flops else 0


def backward_flops(node: fx.Node, *, requires_grad: Collection[fx.Node] | None = None) -> int:
    """Return the FLOPs of the backward of `node`: forward once more per operand with a gradient.

    `requires_grad` holds the nodes whose gradient is wanted (see `gradient_nodes`); None: every
    operand's. Attention with any gradient among q, k, v counts at most 2x forward.
    """
    flops = spec_of(node.target).flops
    if flops is None:
        return 0
    wanted = [o for o in flops.operands(node) if requires_grad is None or o in requires_grad]
    return min(len(wanted), 2) * flops.forward(node)


def slowest_rank(node: fx.Node) -> float:
    """Return the FLOPs of the rank that has most of a node, against the mean."""
    flops = spec_of(node.target).flops
    return flops.slowest(node) if flops else 1.0


def model_flops(graph: fx.Graph) -> int:
    """Return the FLOPs of one forward and backward of a graph, nothing computed twice.

    This over the time of a step is the model's FLOP/s; over the peak of the devices, its MFU.
    """
    requires_grad = gradient_nodes(graph)
    return sum(
        forward_flops(node) + backward_flops(node, requires_grad=requires_grad)
        for node in graph.nodes
    )


def forward_flops_by_region(graph: fx.Graph) -> Counter[int]:
    """Return the FLOPs of one forward of each region, which is what recomputing it costs."""
    flops: Counter[int] = Counter()
    for node in graph.nodes:
        flops[node.meta.get("region", -1)] += forward_flops(node)
    return flops

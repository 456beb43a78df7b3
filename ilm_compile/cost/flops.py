"""Floating-point operations of a node, forward and backward.

Conventions. A multiply-add is 2 FLOPs. Only products of matrices and convolutions count: every op
without a row in `RULES` does 0 FLOPs, being limited by the bytes it moves
(`ilm_compile.cost.roofline`). Causal attention counts the half of the score matrix that a causal
kernel computes, 2 b s^2 h, not the full 4 b s^2 h of the PaLM and Megatron convention; with an
explicit mask nothing is known of its zeros, and attention counts in full. Backward is 2x forward:
what a fused attention kernel computes again of its own forward is not counted, nor is activation
checkpointing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from ilm_compile.cost.nodes import op_name
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.placement import Placement
from ilm_compile.program.query_attention import parts_of, slowest_share


@dataclass(frozen=True, slots=True)
class Rule:
    """How an op counts: its `forward` FLOPs, and the arguments it multiplies."""

    forward: Callable[[fx.Node], int]
    operands: Callable[[fx.Node], Sequence[Any]]


def _shape(argument: Any) -> Sequence[int]:
    shape: Sequence[int] = argument.meta["val"].shape
    return shape


def _product_from(position: int) -> Rule:
    """A matrix product of the arguments `position` and `position + 1`."""

    def forward(node: fx.Node) -> int:
        return 2 * int(node.meta["val"].numel()) * _shape(node.args[position])[-1]

    return Rule(forward, lambda node: node.args[position : position + 2])


def _einsum(node: fx.Node) -> int:
    equation, operands = node.args
    inputs, arrow, result = str(equation).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, operand in zip(inputs.split(","), operands, strict=True):  # type: ignore[arg-type]
        leading, _, trailing = term.partition("...")
        shape = _shape(operand)
        sizes |= dict(zip(leading, shape, strict=False))
        sizes |= dict(zip(reversed(trailing), reversed(shape), strict=False))
    kept = result if arrow else [letter for letter in sizes if inputs.count(letter) == 1]
    contracted = prod(size for letter, size in sizes.items() if letter not in kept)
    num_products = len(operands) - 1  # type: ignore[arg-type]
    return 2 * num_products * int(node.meta["val"].numel()) * contracted


def _convolution(node: fx.Node) -> int:
    return 2 * int(node.meta["val"].numel()) * prod(_shape(node.args[1])[1:])


def _attention(num_heads: int, queries: int, keys: int, dims: int, causal: bool) -> int:
    """Scores and weighted values of all heads of a batch; `dims` of a query and of a value."""
    full = 2 * num_heads * queries * keys * dims
    return full // 2 if causal else full


def _ilm_attention(node: fx.Node) -> int:
    (batch, queries, heads, dim), dims = _shape(node.args[0]), _shape(node.args[2])
    return _attention(batch * heads, queries, _keys(node), dim + dims[3], causal=True)


def _sdpa(node: fx.Node) -> int:
    (*batch, queries, dim), k, v = (_shape(argument) for argument in node.args[:3])
    causal = node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False)
    return _attention(prod(batch), queries, k[-2], dim + v[-1], causal=bool(causal))


def _queries(node: fx.Node) -> int:
    """For a share of the queries: the mean over the ranks (see `slowest_rank`)."""
    (*batch, queries, dim), dims = _shape(node.args[0]), _shape(node.args[2])
    causal = bool(node.args[4])
    return _attention(prod(batch), queries, _keys(node), dim + dims[-1], causal=causal)


def _keys(node: fx.Node) -> int:
    """The keys of a causal attention, those included that are on other ranks."""
    return _shape(node.args[1])[QUERY_DIM.get(op_name(node), 1)] * parts_of(node)


def slowest_rank(node: fx.Node) -> float:
    """Return the FLOPs of the rank that has most of a node, against the mean."""
    if op_name(node) not in QUERY_DIM or node.args[4] is False:  # not causal
        return 1.0
    queries, keys = _shape(node.args[0])[QUERY_DIM[op_name(node)]], _keys(node)
    return slowest_share(Placement.parse(str(node.args[-3])), keys, keys // queries)


QUERY_DIM = {"ilm::query_attention": 1, "ilm::query_dot_product_attention": -2}

RULES: dict[str, Rule] = {
    "aten::linear": _product_from(0),
    "aten::matmul": _product_from(0),
    "aten::mm": _product_from(0),
    "aten::bmm": _product_from(0),
    "aten::addmm": _product_from(1),
    "aten::baddbmm": _product_from(1),
    "aten::_grouped_mm": _product_from(0),  # each row times the matrix of its group
    "ilm::grouped_product": _product_from(0),
    "transformers::grouped_mm_fallback": _product_from(0),
    "aten::conv1d": Rule(_convolution, lambda node: node.args[:2]),
    "aten::conv2d": Rule(_convolution, lambda node: node.args[:2]),
    "aten::einsum": Rule(_einsum, lambda node: node.args[1]),  # type: ignore[arg-type, return-value]
    "aten::scaled_dot_product_attention": Rule(_sdpa, lambda node: node.args[:3]),
    "ilm::attention": Rule(_ilm_attention, lambda node: node.args[:3]),
    "ilm::query_attention": Rule(_ilm_attention, lambda node: node.args[:3]),
    "ilm::query_dot_product_attention": Rule(_queries, lambda node: node.args[:3]),
}
ATTENTION = frozenset(name for name in RULES if "attention" in name)
# Values that carry no gradient whatever they are computed from.
_CUTS = {"aten::detach"}


def forward_flops(node: fx.Node) -> int:
    """Return the FLOPs of one run of `node`, of shapes as in ``node.meta["val"]``."""
    rule = RULES.get(op_name(node))
    return rule.forward(node) if rule else 0


def backward_flops(node: fx.Node, *, requires_grad: Collection[fx.Node] | None = None) -> int:
    """Return the FLOPs of the backward of `node`: forward once more per operand with a gradient.

    `requires_grad` holds the nodes whose gradient is wanted (see `gradient_nodes`); None: every
    operand's. Attention with any gradient among q, k, v counts at most 2x forward.
    """
    rule = RULES.get(op_name(node))
    if rule is None:
        return 0
    wanted = [o for o in rule.operands(node) if requires_grad is None or o in requires_grad]
    return min(len(wanted), 2) * rule.forward(node)


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

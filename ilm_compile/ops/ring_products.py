"""Products in one call with the collective before or behind them (`program.ring_products`).

Made after the search, out of calls that it has placed: the rules are for the check of placements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

from torch import fx

from ilm_compile.ops.call import Call, Strategy
from ilm_compile.ops.nodes import shape_of
from ilm_compile.ops.precision import PRODUCT
from ilm_compile.ops.spec import Flops, rule
from ilm_compile.program.placement import P, Placement, S
from ilm_compile.program.ring_products import gather_products, product_scatter
from ilm_compile.program.values import shapes_of


def _elsewhere(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """On other axes nothing is cut."""
    yield from ()


def multiplied(node: fx.Node) -> list[tuple[Sequence[int], Sequence[int]]]:
    """Of each product of a call on one rank, forward, the shapes of x as multiplied and weight."""
    if node.target is product_scatter:
        return [(shape_of(node.args[0]), shape_of(node.args[1]))]
    weights: Any = node.args[1]
    width = shape_of(node.args[0])[-1]
    return [
        ((*result[:-1], width), shape_of(weight))
        for result, weight in zip(shapes_of(node), weights, strict=True)
    ]


def _flops(node: fx.Node) -> int:
    return sum(2 * prod(x[:-1]) * prod(weight) for x, weight in multiplied(node))


def _operands(node: fx.Node) -> Sequence[Any]:
    weights: Any = node.args[1]
    return node.args[0], weights if node.target is product_scatter else weights[0]


@rule(
    gather_products,
    other_axis=_elsewhere,
    talks=True,
    flops=Flops(_flops, _operands),
    precision=PRODUCT,
)
def gathered(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Tokens are cut, and come back whole; of every weight and bias its rows."""
    for out in wanted:
        if out.is_shard and out.dim == len(call.shape) - 1:
            rows = out.along(0)
            yield Strategy((S(call.args[3]), *(rows for _ in call.shapes[1:])), out)


@rule(
    product_scatter,
    other_axis=_elsewhere,
    talks=True,
    flops=Flops(_flops, _operands),
    precision=PRODUCT,
)
def scattered(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """What is multiplied is cut; the sum is cut by tokens. A bias is partial, as the product is."""
    last = len(call.shape) - 1
    bias = (P for _ in call.shapes[2:])
    yield Strategy((S(last), S(1), *bias), S(call.args[3]))

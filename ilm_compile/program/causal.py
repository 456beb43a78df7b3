"""Causal masks that a model computes from nothing but sizes, recognised and made a flag.

Hugging Face models build their mask from ``arange``s. As a tensor it rules out flash attention and
costs memory quadratic in the sequence; as ``is_causal=True`` it costs nothing. Here a mask that
depends on no input, parameter or buffer is looked at in halves, on and below the diagonal and above
it: a comparison of what the rows have with what the columns have is true or false of a whole half
if it is so for the extremes of the columns, which takes time linear in the sequence. What is made
in another way is computed once and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.arguments import argument
from ilm_compile.program.input_graph import graph_to
from ilm_compile.program.program import Program

aten = torch.ops.aten
MAX_ELEMENTS = 2**28  # of a mask that is computed to be compared


def fold_causal_masks(program: Program) -> None:
    """Replace every attention mask that is constant and causal by ``is_causal=True``."""
    known: dict[fx.Node, bool] = {}
    target = aten.scaled_dot_product_attention.default
    for node in program.graph.find_nodes(op="call_function", target=target):
        mask = argument(node, "attn_mask")
        if not isinstance(mask, fx.Node):
            continue
        if mask not in known:
            known[mask] = _is_causal(mask)
        if known[mask]:
            rest = dict(node.kwargs) | {"attn_mask": None, "is_causal": True}
            node.args, node.kwargs = node.args[:3], rest


def _is_causal(mask: fx.Node) -> bool:
    val = mask.meta["val"]
    if val.dtype != torch.bool or val.shape[-1] != val.shape[-2]:
        return False
    graph = graph_to(mask, _is_given)
    if graph is None:  # it depends on more than sizes
        return False
    if _halves(mask) == (True, False):
        return True
    if val.numel() > MAX_ELEMENTS:
        return False
    value = graph()
    return bool((value == torch.ones_like(value).tril()).all())


Half = bool | None  # what all of its elements are, None where they differ or it is not known
_AND = {aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default}
_COMPARISONS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    aten.le.Tensor: torch.le,
    aten.lt.Tensor: torch.lt,
    aten.ge.Tensor: torch.ge,
    aten.gt.Tensor: torch.gt,
    aten.eq.Tensor: torch.eq,
}


def _is_given(node: fx.Node) -> bool:
    return node.op != "call_function"


def _value(node: fx.Node) -> Tensor:
    graph = graph_to(node, _is_given)
    assert graph is not None  # what the whole mask depends on was asked
    value: Tensor = graph()
    return value


def _halves(node: fx.Node) -> tuple[Half, Half]:
    if node.meta["val"].numel() == 1:
        value = bool(_value(node))
        return value, value
    parts = node.all_input_nodes
    if node.target in _AND and len(parts) == 2:
        (a, b), (c, d) = map(_halves, parts)
        return _both(a, c), _both(b, d)
    if node.target in _COMPARISONS and len(parts) == 2:
        return _compared(_COMPARISONS[node.target], *parts)
    return None, None


def _both(one: Half, other: Half) -> Half:
    return False if False in (one, other) else True if one and other else None


def _compared(compare: Callable[..., Tensor], one: fx.Node, other: fx.Node) -> tuple[Half, Half]:
    """Return the halves of a comparison of a number of each row with one of each column."""
    shapes = [node.meta["val"].shape for node in (one, other)]
    length = max(shapes[0].numel(), shapes[1].numel())
    tails = [tuple(shape)[-2:] for shape in shapes if shape.numel() == length]
    if sorted(tails) != [(1, length), (length, 1)]:
        return None, None
    first, second = _value(one).flatten(), _value(other).flatten()
    if tails[0] == (length, 1):
        rows, columns, holds = first, second, compare
    else:
        rows, columns, holds = second, first, lambda row, column: compare(column, row)
    before = columns.cummin(0).values, columns.cummax(0).values  # extremes up to each column
    back = columns.flip(0)
    after = back.cummin(0).values.flip(0)[1:], back.cummax(0).values.flip(0)[1:]  # beyond each
    is_ordered = compare is not torch.eq  # if not, it may hold between two where it does not
    halves: list[Half] = []
    for row, (least, most) in ((rows, before), (rows[:-1], after)):
        low, high = holds(row, least), holds(row, most)
        if (low & high).all():
            halves.append(True)
        else:
            halves.append(None if not is_ordered or (low | high).any() else False)
    return halves[0], halves[1]

"""Causal masks that a model computes from nothing but sizes, recognised and made a flag.

Hugging Face models build their mask from ``arange``s. As a tensor it rules out flash attention and
costs memory quadratic in the sequence; as ``is_causal=True`` it costs nothing. A mask that depends
on no input, parameter or buffer is computed once here, and compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ilm_compile.program.program import Program

aten = torch.ops.aten
MAX_ELEMENTS = 2**28  # of a mask that is computed to be compared


def fold_causal_masks(program: Program) -> None:
    """Replace every attention mask that is constant and causal by ``is_causal=True``."""
    known: dict[fx.Node, bool] = {}
    target = aten.scaled_dot_product_attention.default
    for node in program.graph.find_nodes(op="call_function", target=target):
        mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node):
            continue
        if mask not in known:
            known[mask] = _is_causal(mask)
        if known[mask]:
            rest = dict(node.kwargs) | {"attn_mask": None, "is_causal": True}
            node.args, node.kwargs = node.args[:3], rest


def _is_causal(mask: fx.Node) -> bool:
    val = mask.meta["val"]
    if val.dtype != torch.bool or val.numel() > MAX_ELEMENTS or val.shape[-1] != val.shape[-2]:
        return False
    value = _constant(mask)
    if value is None:
        return False
    return bool((value == torch.ones_like(value).tril()).all())


def _constant(node: fx.Node) -> Tensor | None:
    """Return the value of `node` if it depends on sizes alone."""
    needed: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current.op != "call_function":
            return None
        if current not in needed:
            needed.add(current)
            pending += current.all_input_nodes
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for current in node.graph.nodes:
        if current in needed:
            copied[current] = graph.node_copy(current, copied.__getitem__)
    graph.output(copied[node])
    value: Tensor = fx.GraphModule(nn.Module(), graph)()
    return value

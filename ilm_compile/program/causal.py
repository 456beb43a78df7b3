"""Causal masks that a model computes from nothing but sizes, recognised and made a flag.

Hugging Face models build their mask from ``arange``s. As a tensor it rules out flash attention and
costs memory quadratic in the sequence; as ``is_causal=True`` it costs nothing. A mask that depends
on no input, parameter or buffer is computed once here, and compared.
"""

from __future__ import annotations

import torch
from torch import fx

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
    if val.dtype != torch.bool or val.numel() > MAX_ELEMENTS or val.shape[-1] != val.shape[-2]:
        return False
    graph = graph_to(mask, lambda node: node.op != "call_function")
    if graph is None:  # it depends on more than sizes
        return False
    value = graph()
    return bool((value == torch.ones_like(value).tril()).all())

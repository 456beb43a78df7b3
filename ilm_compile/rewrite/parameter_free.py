"""Nodes that no parameter reaches: rotary tables, masks, positions, labels.

Every rank can compute them from its own copy of the batch, so they are never sent between stages,
and rounding them to bf16 would save nothing and cost accuracy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ilm_compile.program.program import Program

aten = torch.ops.aten
# Ops that draw random numbers only for a probability above 0: where that argument stands.
_PROBABILITY: dict[Any, tuple[int, str]] = {
    aten.scaled_dot_product_attention.default: (4, "dropout_p"),
    aten.dropout.default: (1, "p"),
}


def is_random(node: fx.Node) -> bool:
    """Whether running `node` twice gives two results."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    if node.target not in _PROBABILITY:
        return True
    position, name = _PROBABILITY[node.target]
    given = node.args[position] if position < len(node.args) else node.kwargs.get(name)
    return bool(given)


def parameter_free_nodes(program: Program) -> set[fx.Node]:
    """Return the calls that depend on inputs, constants and buffers alone, and draw nothing."""
    free: set[fx.Node] = set()
    for node in program.calls():
        if not is_random(node) and all(_is_free(program, n, free) for n in node.all_input_nodes):
            free.add(node)
    return free


def _is_free(program: Program, node: fx.Node, free: set[fx.Node]) -> bool:
    if node.op == "get_attr":
        return not program.variables[str(node.target)].is_parameter
    return node.op == "placeholder" or node in free

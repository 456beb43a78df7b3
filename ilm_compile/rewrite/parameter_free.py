"""Nodes that no parameter reaches: rotary tables, masks, positions, labels.

Every rank can compute them from its own copy of the batch, so they are never sent between stages,
and rounding them to bf16 would save nothing and cost accuracy.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from ilm_compile.ops.precision import EXACT, Precision
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.arguments import argument
from ilm_compile.program.program import Program


def is_random(node: fx.Node) -> bool:
    """Whether running `node` twice gives two results."""
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    probability = spec_of(node.target).probability
    return probability is None or bool(argument(node, probability[1]))


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


def precision_of(node: fx.Node, parameter_free: Collection[fx.Node]) -> Precision:
    """Return in what a call computes. `parameter_free`: the nodes that no parameter reaches."""
    return EXACT if node in parameter_free else spec_of(node.target).precision

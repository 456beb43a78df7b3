"""Which values of a graph a gradient flows through."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ilm_compile.program.input_graph import reached
from ilm_compile.program.values import is_real

CUTS = {torch.ops.aten.detach.default}


def gradient_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes through which a gradient flows: trained parameters and what they lead to."""
    module = graph.owning_module
    parameters: dict[str, nn.Parameter] = (
        dict(module.named_parameters(remove_duplicate=False)) if module else {}
    )
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            leaf = parameters.get(str(node.target), node.meta.get("val"))
            is_found = isinstance(leaf, Tensor) and leaf.requires_grad
        else:
            is_cut = node.target in CUTS or not is_real(node)
            is_found = not is_cut and not found.isdisjoint(node.all_input_nodes)
        if is_found:
            found.add(node)
    return found


def wanted_gradients(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes on a differentiable path from a trained parameter to the loss.

    The loss is the first output.
    """
    differentiable = gradient_nodes(graph)
    loss: fx.Node = graph.output_node().args[0][0]  # type: ignore[index, assignment]
    return differentiable.intersection(
        reached([loss], lambda n: n.all_input_nodes if n in differentiable else ())
    )

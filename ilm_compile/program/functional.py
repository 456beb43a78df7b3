"""In-place ops, rewritten: a graph whose values never change under the reader's hands."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.export import ExportedProgram

from ilm_compile.errors import TraceError


def functionalize(exported: ExportedProgram) -> ExportedProgram:
    """Return `exported` without in-place ops; composite ops stay whole.

    torch.export's own functionalisation drops ``torch.no_grad`` blocks, so a model that has both
    in-place ops and activations inside such a block is refused with a `TraceError`.
    """
    if not any(_writes(node) for node in _calls(exported.graph_module)):
        return exported
    if blocked := _blocked_activation(exported):
        raise TraceError(
            f"trace: {blocked} is used under torch.no_grad in a model that also has in-place ops "
            "(x += y, x.mul_()); write these as x = x + y, or use .detach() instead of no_grad"
        )
    result: ExportedProgram = exported.run_decompositions({})
    return result


def _calls(module: torch.nn.Module) -> Iterator[fx.Node]:
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            yield from (node for node in child.graph.nodes if node.op == "call_function")


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _blocked_activation(exported: ExportedProgram) -> str | None:
    """Return a value that depends on a parameter and enters a no_grad block, if there is one."""
    trained = set(exported.graph_signature.inputs_to_parameters)
    reached: set[fx.Node] = set()
    for node in exported.graph.nodes:
        inputs = reached.intersection(node.all_input_nodes)
        if node.name in trained or inputs:
            reached.add(node)
        if inputs and str(node.target) == "wrap_with_set_grad_enabled" and node.args[0] is False:
            return next(iter(inputs)).name
    return None

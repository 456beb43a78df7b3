"""In-place ops, rewritten: a graph whose values never change under the reader's hands."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.export import ExportedProgram

from ilm_compile.errors import TraceError

WITH_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


def functionalize(exported: ExportedProgram) -> ExportedProgram:
    """Return `exported` without in-place ops; composite ops stay whole.

    torch.export's own functionalisation drops ``torch.no_grad`` blocks; what they return is detached
    first. Raises `TraceError` for an in-place op inside such a block on a value that depends on a
    parameter: it would change the value without autograd's knowledge.
    """
    if not any(_writes(node) for node in _calls(exported.graph_module)):
        return exported
    _detach_blocks(exported)
    result: ExportedProgram = exported.run_decompositions({})
    return result


def _detach_blocks(exported: ExportedProgram) -> None:
    """Detach whatever a no_grad block returns."""
    graph = exported.graph
    differentiable = _differentiable(exported)
    for block in graph.find_nodes(op="call_function", target=WITH_GRAD):
        body = getattr(exported.graph_module, str(block.args[1].target))
        if block.args[0] is not False or differentiable.isdisjoint(block.all_input_nodes):
            continue
        if written := next((node for node in _calls(body) if _writes(node)), None):
            raise TraceError(
                f"trace: {written.target} changes a value in place under torch.no_grad, in a model "
                "with parameters before it; write x = x + y for x += y, or use .detach() instead"
            )
        for value in list(block.users):
            with graph.inserting_after(value):
                detached = graph.call_function(torch.ops.aten.detach.default, (value,))
            detached.meta = dict(value.meta)
            value.replace_all_uses_with(detached, lambda user, kept=detached: user is not kept)
    exported.graph_module.recompile()


def _differentiable(exported: ExportedProgram) -> set[fx.Node]:
    """Return the values that depend on a parameter."""
    trained = set(exported.graph_signature.inputs_to_parameters)
    reached: set[fx.Node] = set()
    for node in exported.graph.nodes:
        if node.name in trained or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _calls(module: torch.nn.Module) -> Iterator[fx.Node]:
    for child in module.modules():
        if isinstance(child, fx.GraphModule):
            yield from (node for node in child.graph.nodes if node.op == "call_function")


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable

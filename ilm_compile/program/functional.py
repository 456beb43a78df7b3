"""In-place ops, rewritten: a graph whose values never change under the reader's hands."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.export import ExportedProgram

from ilm_compile.errors import TraceError
from ilm_compile.program.randomness import refuse_random
from ilm_compile.program.users_line import source_of

aten = torch.ops.aten
WITH_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


def functionalize(exported: ExportedProgram) -> ExportedProgram:
    """Return `exported` without in-place ops; composite ops stay whole.

    torch.export's own functionalisation drops ``torch.no_grad`` blocks; what they return is
    detached first. Raises `TraceError` for an in-place op inside a block that takes a value which
    depends on a parameter: it could change that value without autograd's knowledge, and for random
    numbers other than dropout.
    """
    # Numbers that are drawn for nothing: LayerDrop with a probability of 0 compares them with it.
    exported.graph.eliminate_dead_code(lambda node: node.is_impure(impure_random=False))
    for node in _calls(exported.graph_module):
        refuse_random(node, node.target)
        if node.target is aten.embedding_renorm_.default:
            raise TraceError(
                f"trace: an embedding with max_norm rewrites its weights in the forward "
                f"({source_of(node)}), and a pipelined step has no single place for that. Leave "
                "max_norm out and scale the rows that are read by (max_norm / norm).clamp(max=1)"
            )
    _take_fresh_constants(exported)
    if not any(_writes(node) for node in _calls(exported.graph_module)):
        return exported
    _dropout_out_of_place(exported)
    _detach_blocks(exported)
    result: ExportedProgram = exported.run_decompositions({})
    return result


def _take_fresh_constants(exported: ExportedProgram) -> None:
    """Drop the ``detach_`` that ``torch.tensor`` puts on what it has made: it writes to nothing."""
    for module in exported.graph_module.modules():
        graph = module.graph if isinstance(module, fx.GraphModule) else fx.Graph()
        written = graph.find_nodes(op="call_function", target=aten.detach_.default)
        fresh = [n for n in written if n.args[0].target is aten.lift_fresh_copy.default]
        for node in fresh:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        if fresh:
            module.recompile()


def _dropout_out_of_place(exported: ExportedProgram) -> None:
    """Write ``dropout_`` as a dropout and a copy, or its random numbers would be drawn apart."""
    for module in exported.graph_module.modules():
        graph = module.graph if isinstance(module, fx.GraphModule) else fx.Graph()
        for node in graph.find_nodes(op="call_function", target=aten.dropout_.default):
            with graph.inserting_before(node):
                drawn = graph.call_function(aten.dropout.default, node.args)
            drawn.meta = dict(node.meta)
            node.target, node.args = aten.copy_.default, (node.args[0], drawn)
        if isinstance(module, fx.GraphModule):
            module.recompile()


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
                f"trace: {written.target} changes a value in place under torch.no_grad "
                f"({source_of(written)}), in a model with parameters before it; write x = x + y "
                "for x += y, or use .detach() instead"
            )
        passed = passed_through(body)
        for value in list(block.users):
            if value.args[1] in passed:
                value.replace_all_uses_with(block.args[2 + passed[value.args[1]]])
                continue
            with graph.inserting_after(value):
                detached = graph.call_function(aten.detach.default, (value,))
            detached.meta = dict(value.meta)
            value.replace_all_uses_with(detached, lambda user, kept=detached: user is not kept)
    exported.graph_module.recompile()


def passed_through(body: fx.GraphModule) -> dict[int, int]:
    """Return which outputs of a no_grad block are one of its inputs: output index to input index.

    A cast to the dtype that a tensor has already returns the very tensor, so what the model does
    with it after the block is done with a value that has its gradient.
    """
    inputs = body.graph.find_nodes(op="placeholder")
    found = {}
    for index, node in enumerate(body.graph.output_node().args[0]):  # type: ignore[arg-type]
        while node.target in _IDENTITIES and _is_same(node, node.args[0]):
            node = node.args[0]
        if node in inputs:
            found[index] = inputs.index(node)
    return found


_IDENTITIES = {
    *(aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other),
    *(aten.type_as.default, aten.contiguous.default),
}


def _is_same(node: fx.Node, source: fx.Node) -> bool:
    """Whether a call returned its input: with nothing to do, these ops do not copy."""
    val, before = node.meta["val"], source.meta["val"]
    return bool(val.dtype == before.dtype and val.stride() == before.stride())


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

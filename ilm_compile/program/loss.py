"""The loss of a micro-batch, normalised by the targets of the whole global batch.

A mean over the targets of one micro-batch cannot be averaged over micro-batches: they have unequal
numbers of targets. So each mean cross entropy is rewritten to a sum divided by a new scalar input,
the number of targets per micro-batch (all targets of the global batch / all its micro-batches). The
plain average of the micro-batch losses is then the loss of the global batch, and the rest of the
user's loss (an auxiliary term, a factor) keeps its meaning.
"""

from __future__ import annotations

import torch
from torch import fx

from ilm_compile.program.input_graph import graph_from_inputs
from ilm_compile.program.program import Program, Source

aten = torch.ops.aten
MEAN, SUM = 1, 2
DEFAULTS = (None, MEAN, -100, 0.0)  # weight, reduction, ignore_index, label_smoothing
NUM_TARGETS = "num_targets"


def cross_entropy_arguments(node: fx.Node) -> tuple[fx.Node | None, int, int, float]:
    """Return (weight, reduction, ignore_index, label_smoothing) of a cross_entropy_loss node."""
    given = tuple(node.args[2:])
    names = ("weight", "reduction", "ignore_index", "label_smoothing")
    values = given + DEFAULTS[len(given) :]
    return tuple(node.kwargs.get(n, v) for n, v in zip(names, values, strict=True))  # type: ignore[return-value]


def normalize_loss(program: Program) -> None:
    """Rewrite every mean cross entropy whose targets come from the inputs alone."""
    graph = program.graph
    for node in graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
        weight, reduction, ignore_index, smoothing = cross_entropy_arguments(node)
        count = _count_targets(node.args[1], ignore_index)
        if reduction != MEAN or weight is not None or count is None:
            continue
        name = NUM_TARGETS + (f"_{len(program.target_counts)}" if program.target_counts else "")
        last = list(graph.find_nodes(op="placeholder"))[-1]
        with graph.inserting_after(last):
            placeholder = graph.placeholder(name)
        val = node.meta["val"]
        placeholder.meta["val"] = val.new_empty(())
        with graph.inserting_after(node):
            mean = graph.call_function(aten.div.Tensor, (node, placeholder))
        mean.meta.update(val=val, source=program.source(node))
        node.replace_all_uses_with(mean, delete_user_cb=lambda user, mean=mean: user is not mean)
        node.args = (*node.args[:2], None, SUM, ignore_index, smoothing)
        node.kwargs = {}
        program.target_counts[name] = count
    _expose_logits(program)


def _count_targets(target: fx.Node, ignore_index: int) -> fx.GraphModule | None:
    """Return the graph from the inputs to the number of targets.

    None if it needs more than inputs, or if the targets are probabilities, which count as rows do.
    """
    if target.meta["val"].is_floating_point():
        return None
    found = graph_from_inputs(target)
    if found is None:
        return None
    output = found.graph.output_node()
    (targets,) = output.all_input_nodes
    with found.graph.inserting_before(output):
        counted = found.graph.call_function(aten.ne.Scalar, (targets, ignore_index))
        output.args = (found.graph.call_function(aten.sum.default, (counted,)),)
    found.recompile()
    return found


def _expose_logits(program: Program) -> None:
    """Make the cross entropy's input the second output of a model that returns its loss alone."""
    output = program.graph.output_node()
    losses = program.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default)
    if len(program.output_names) == 1 and losses:
        output.args = ((*output.args[0], losses[0].args[0]),)  # type: ignore[misc]
        program.output_names += ("logits",)
        losses[0].meta.setdefault("source", Source())

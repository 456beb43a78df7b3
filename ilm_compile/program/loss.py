"""What a loss divides by, counted over the whole global batch before a step.

A mean over the targets of one micro-batch cannot be averaged over micro-batches: they have unequal
numbers of targets. So each mean cross entropy is rewritten to a sum divided by a new scalar input,
the number of targets per micro-batch (all targets of the global batch / all its micro-batches). The
plain average of the micro-batch losses is then the loss of the global batch, and the rest of the
user's loss (an auxiliary term, a factor) keeps its meaning. Other sums that the inputs alone decide
are counted in the same way, where `ilm_compile.sharding.loss_terms` finds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from operator import is_not
from typing import Any

import torch
from torch import fx, nn

from ilm_compile.program.arguments import argument
from ilm_compile.program.counts import count_classes
from ilm_compile.program.input_graph import graph_from_inputs
from ilm_compile.program.program import Count, Program, Source, Variable
from ilm_compile.program.reductions import MEAN, SUM
from ilm_compile.program.values import run_without_data

aten = torch.ops.aten
NUM_TARGETS, NUM_SLICES = "num_targets", "num_slices"
_LOSSES = (aten.cross_entropy_loss.default, aten.nll_loss_nd.default)


def cross_entropy_arguments(node: fx.Node) -> tuple[fx.Node | None, int, int, float]:
    """Return (weight, reduction, ignore_index, label_smoothing) of a cross_entropy_loss node."""
    names = ("weight", "reduction", "ignore_index", "label_smoothing")
    weight, reduction, ignore_index, smoothing = (argument(node, name) for name in names)
    return weight, reduction, ignore_index, smoothing or 0.0


def normalize_loss(program: Program) -> None:
    """Rewrite every mean cross entropy whose targets come from the inputs alone."""
    graph, dtype = program.graph, counting_dtype(program.variables.values())
    for node in [n for n in graph.nodes if n.target in _LOSSES]:
        node = _joined(graph, node)
        weight, reduction, ignore_index, smoothing = cross_entropy_arguments(node)
        classes = None if weight is None else weight.meta["val"].shape[0]
        count = _count_targets(node.all_input_nodes[1], ignore_index, classes)
        if reduction != MEAN or count is None:
            continue
        shape = () if classes is None else (classes,)
        last, total = node, add_count(program, NUM_TARGETS, Count(count, -1), shape, dtype)
        if weight is not None:  # by class, for what a class weighs the inputs do not tell
            weighed = insert_after(node, aten.mul.Tensor, (weight, total))
            last = total = insert_after(weighed, aten.sum.default, (weighed,))
        mean = insert_after(last, aten.div.Tensor, (node, total))
        node.replace_all_uses_with(mean, delete_user_cb=partial(is_not, mean))
        options = (weight, SUM, ignore_index, smoothing)
        node.args = (*node.args[:2], *options[: 3 if node.target is _LOSSES[1] else 4])
        node.kwargs = {}
    _expose_logits(program)


def add_count(
    program: Program, name: str, count: Count, shape: Sequence[int], dtype: torch.dtype
) -> fx.Node:
    """Return a new placeholder, named after `name`, which is given what `count` counts.

    dtype: int64, or what `counting_dtype` says.
    """
    graph = program.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    same = sum(f"{node.target}_".startswith(f"{name}_") for node in placeholders)
    name += f"_{same}" if same else ""
    with graph.inserting_after(placeholders[-1]):
        placeholder: fx.Node = graph.placeholder(name)
    placeholder.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
    program.target_counts[name] = count
    return placeholder


def num_slices(program: Program) -> fx.Node:
    """Return the placeholder that is given the number of micro-batches of the global batch."""
    counts = program.target_counts
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.target in counts and not counts[node.target].inputs:
            return node  # type: ignore[no-any-return]
    graph = fx.Graph()
    graph.output(graph.call_function(aten.full.default, ([], 1), {"dtype": torch.int64}))
    count = Count(fx.GraphModule(nn.Module(), graph))
    return add_count(program, NUM_SLICES, count, (), torch.int64)


def counting_dtype(variables: Iterable[Variable]) -> torch.dtype:
    """Return the dtype of counts: float32 at least, for bfloat16 cannot hold the number 257."""
    dtypes = {variable.dtype for variable in variables if variable.is_parameter}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def insert_after(
    node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> fx.Node:
    """Return a new call behind `node`, of the same line and region."""
    with node.graph.inserting_after(node):
        call = node.graph.call_function(target, args, dict(kwargs or {}))
    call.meta.update(node.meta)
    find_value(call)
    return call


def find_value(call: fx.Node) -> None:
    """Set what the value of a call is like, from those of its inputs."""
    with torch.no_grad():
        call.meta["val"] = run_without_data(call)


def _joined(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A cross entropy written as nll_loss(log_softmax) in one call, as other rules know it."""
    scores: Any = node.args[0]
    if node.target is _LOSSES[0] or scores.target is not aten.log_softmax.int:
        return node
    logits, dim = scores.args[:2]
    rank = logits.meta["val"].dim()
    if dim % rank != min(1, rank - 1) or logits.meta["val"].dtype != scores.meta["val"].dtype:
        return node
    joined = insert_after(node, _LOSSES[0], (logits, *node.args[1:]), node.kwargs)
    node.replace_all_uses_with(joined)
    graph.erase_node(node)
    return joined


def _count_targets(
    target: fx.Node, ignore_index: int, classes: int | None
) -> fx.GraphModule | None:
    """Return the graph from the inputs to the number of targets; of each class if `classes`.

    None if it needs more than inputs, or if the targets are probabilities, which count as rows do.
    """
    if target.meta["val"].is_floating_point():
        return None
    found = graph_from_inputs(target)
    if found is None:
        return None
    call = found.graph.call_function
    output = found.graph.output_node()
    (targets,) = output.all_input_nodes
    with found.graph.inserting_before(output):
        if classes is None:
            total = call(aten.sum.default, (call(aten.ne.Scalar, (targets, ignore_index)),))
        else:
            none = call(aten.eq.Scalar, (targets, ignore_index))
            filled = call(aten.masked_fill.Scalar, (targets, none, classes))
            flat = call(aten.reshape.default, (filled, [-1]))
            each = call(count_classes, (flat, None, classes + 1))
            total = call(aten.slice.Tensor, (each, 0, 0, classes))
    output.args = (total,)
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

"""The losses of nearly all models, known from one trace to be averages over micro-batches.

That is a mean cross entropy, or a sum of them, in a model that does nothing over dimension 0 of its
activations, where the rows of the batch lie. What looks otherwise is looked at more closely.
"""

from __future__ import annotations

from torch import fx

from ilm_compile.ops.call import aten, tensor_inputs
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.loss import NUM_TARGETS, SUM, cross_entropy_arguments
from ilm_compile.program.program import Program
from ilm_compile.sharding.batch_axis import as_call

_TURNS = {aten.permute.default, aten.transpose.int, aten.t.default, aten.einsum.default}


def is_plain(program: Program) -> bool:
    """Whether the loss of `program`, as traced, is a sum of mean cross entropies of single rows."""
    reached: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
        if node in reached and node.op == "call_function" and _may_reach_over_rows(node):
            return False
    return _is_mean_cross_entropy(program.outputs[0])


def _is_mean_cross_entropy(node: fx.Node) -> bool:
    inputs = tensor_inputs(node)
    if len(inputs) != 2:
        return False
    if node.target is aten.add.Tensor:
        return all(map(_is_mean_cross_entropy, inputs))
    loss, count = inputs
    counts = count.op == "placeholder" and str(count.target).startswith(NUM_TARGETS)
    is_sum = (
        loss.target is aten.cross_entropy_loss.default and SUM == (cross_entropy_arguments(loss)[1])
    )
    return node.target is aten.div.Tensor and is_sum and counts


def _may_reach_over_rows(node: fx.Node) -> bool:
    first = next(iter(tensor_inputs(node)), None)
    if first is None or not first.meta["val"].is_floating_point() or not first.meta["val"].dim():
        return False
    spec = spec_of(node.target)
    if spec.reaches and spec.rows != "moved":
        call = as_call(node)
        return 0 in {dim % len(call.shapes[0]) for dim in spec.reaches(call)}
    # Rows that leave dimension 0 could be reached over anywhere.
    return node.target in _TURNS and _moves_rows(node)


def _moves_rows(node: fx.Node) -> bool:
    call = as_call(node)
    if node.target is aten.einsum.default:
        terms, _, output = str(call.args[0]).replace(" ", "").partition("->")
        return terms[:1] != output[:1]
    if node.target is aten.permute.default:
        return bool(call.args[1][0] % len(call.shape))
    moved = call.args[1:] or (0, 1)
    return any(int(dim) % len(call.shape) == 0 for dim in moved)

"""Vocabularies that the tensor-parallel size does not divide: padded with rows of zeros.

The padded classes get a logit of minus infinity, so neither the loss nor any gradient sees them,
and rows of zeros with zero gradients stay zero. Checkpoints, gradients and logits leave without
them: see ``Variable.padding`` and ``Program.output_widths``.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import torch
from torch import fx, nn

from ilm_compile.ops.call import aten
from ilm_compile.program.attributes import put_tensor
from ilm_compile.program.loss import cross_entropy_arguments
from ilm_compile.program.program import Program
from ilm_compile.sharding.batch_axis import as_call

# Ops that treat each class on its own, given that the last dimension stays what it is.
CLASSWISE = {
    *(aten.reshape.default, aten.contiguous.default, aten.to.dtype, aten.clone.default),
    *(aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.tanh.default),
    *(aten.slice.Tensor, aten.select.int, aten.add.Tensor),
}
# Ops that, over the last dimension alone, do not see a class of minus infinity.
_LOSS = aten.cross_entropy_loss.default
BLIND = {aten.logsumexp.default, aten.amax.default, aten.argmax.default}


def pad_vocabulary(program: Program, size: int) -> None:
    """Pad every embedding and head weight whose vocabulary `size` does not divide."""
    for node in program.graph.find_nodes(op="get_attr"):
        variable = program.variables[str(node.target)]
        if not variable.is_parameter or len(variable.shape) != 2 or variable.shape[0] % size == 0:
            continue
        heads = [user for user in node.users if user.target is aten.linear.default]
        lookups = [user for user in node.users if user.target is aten.embedding.default]
        chains = [list(_chain(program, head)) for head in heads]
        if len(heads) + len(lookups) < len(node.users) or any(None in chain for chain in chains):
            continue  # some use of the weight knows more of the vocabulary than one class at a time
        width = variable.shape[0]
        padding = -width % size
        _pad(program, node, padding)
        for head, chain in zip(heads, chains, strict=True):
            for value in head.args[2:]:
                _pad(program, value, padding)
            _widen(program, [n for n in chain if n is not None], width, width + padding)
        program.decisions.append(
            f"tensor-parallel: {variable.name} is padded from {width} to {width + padding} rows, "
            f"so that {size} ranks divide them"
        )


def _chain(program: Program, head: fx.Node) -> Iterator[fx.Node | None]:
    """Yield the nodes that hold logits, from the head to the losses; None if one is unknown."""
    width = head.meta["val"].shape[-1]
    yield head
    for user in head.users:
        if user.op == "output":
            continue
        if user.target is _LOSS:
            weight, *_, smoothing = cross_entropy_arguments(user)
            if weight is not None or smoothing or len(head.meta["val"].shape) != 2:
                yield None
            continue
        if _is_blind(user):
            continue
        kept = user.target in CLASSWISE and user.meta["val"].shape[-1:] == (width,)
        others = [n for n in user.all_input_nodes if n is not head]
        if not kept or any(n.meta["val"].dim() for n in others):
            yield None
            return
        yield from _chain(program, user)


def _is_blind(user: fx.Node) -> bool:
    if user.target not in BLIND:
        return False
    dims = as_call(user).named("dim")
    last = user.all_input_nodes[0].meta["val"].dim() - 1
    return dims in (-1, last, [-1], [last])


def _pad(program: Program, node: fx.Node, padding: int) -> None:
    variable = program.variables[str(node.target)]
    variable.shape = (variable.shape[0] + padding, *variable.shape[1:])
    variable.padding = padding
    meta = torch.empty(variable.shape, dtype=variable.dtype, device="meta")
    held = nn.Parameter(meta, requires_grad=variable.requires_grad)
    put_tensor(program.graph_module, variable.name, held)
    node.meta["val"] = meta


def _widen(program: Program, chain: list[fx.Node], width: int, padded: int) -> None:
    outputs = dict(zip(program.outputs, program.output_names, strict=True))
    for node in chain:
        shape = (*node.meta["val"].shape[:-1], padded)
        node.meta["val"] = node.meta["val"].new_empty(shape)
        if node.target is aten.reshape.default:
            node.args = (node.args[0], list(shape))
        if node in outputs:
            program.output_widths[outputs[node]] = width
        ends = [u for u in node.users if u.target is _LOSS or _is_blind(u)]
        if ends:
            masked = _masked(program, node, min(ends), width, padded)
            for user in ends:
                user.replace_input_with(node, masked)


def _masked(program: Program, node: fx.Node, user: fx.Node, width: int, padded: int) -> fx.Node:
    graph = program.graph
    with graph.inserting_before(user):
        classes = graph.call_function(aten.arange.default, (padded,))
        mask = graph.call_function(aten.ge.Scalar, (classes, width))
        masked = graph.call_function(aten.masked_fill.Scalar, (node, mask, -inf))
    for new, val in (
        (classes, torch.empty(padded, dtype=torch.int64, device="meta")),
        (mask, torch.empty(padded, dtype=torch.bool, device="meta")),
        (masked, node.meta["val"]),
    ):
        new.meta.update(val=val, source=program.source(user), region=user.meta["region"])
    return masked

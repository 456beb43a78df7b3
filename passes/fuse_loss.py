"""A head and its cross entropy as one call, whose logits never exist for all tokens at once.

The vocabulary is sharded by then, and products are cast; what a stage or a recomputed block keeps
is not decided yet, since the logits are the largest value of most models. Those that the model
returns beside its loss are computed apart, and only where somebody asks for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from ilm_compile.passes.base import Pass
from ilm_compile.passes.fuse_kernels import report
from ilm_compile.program.dump import target_name
from ilm_compile.program.linear_loss import linear_cross_entropy, output_logits
from ilm_compile.program.loss import cross_entropy_arguments
from ilm_compile.program.program import Program
from ilm_compile.program.values import take_name
from ilm_compile.program.vocab import vocab_cross_entropy
from ilm_compile.rewrite.edit import insert_before, insert_like
from ilm_compile.rewrite.fusion import Found, Left, args, aten, dtype, is_call, shape

OP = "linear_cross_entropy"
LOSSES = (aten.cross_entropy_loss.default, vocab_cross_entropy)
# What may stand between logits and loss, given that it leaves the last dimension alone.
VIEWS = (aten.reshape.default, aten.contiguous.default, aten.slice.Tensor)


@dataclass(frozen=True, kw_only=True)
class FuseLoss(Pass):
    """Replace a product with a weight and the cross entropy of it by `linear_cross_entropy`.

    Equal up to the order of sums. In 16 bits the gradient of a weight that is cast in each
    micro-batch is not rounded any more, and logits are not read twice in a wider dtype.
    """

    name: ClassVar[str] = "fuse-loss"
    after: ClassVar[frozenset[str]] = frozenset({"fused", "sharded", "cast"})
    before: ClassVar[frozenset[str]] = frozenset({"checkpointed", "split", "masters"})
    ensures: ClassVar[frozenset[str]] = frozenset({"loss"})
    numerics: ClassVar[Literal["preserving", "changing"]] = "changing"
    tolerance: ClassVar[float] = 2e-3

    def apply(self, program: Program) -> None:
        fused: list[fx.Node] = []
        left: list[Left] = []
        for loss in [node for node in program.calls() if is_call(node, *LOSSES)]:
            chain = _chain(loss)
            if reason := _refusal(loss, chain):
                left.append(Left(OP, loss, reason))
            else:
                fused.append(_fuse(program, loss, chain))
        report(program, self.name, OP, Found(tuple(fused), tuple(left)))


def _chain(loss: fx.Node) -> list[fx.Node]:
    """Return what stands between the product and the loss, the product first."""
    found = [args(loss)[0]]
    while is_call(found[0], *VIEWS, aten.to.dtype):
        found.insert(0, args(found[0])[0])
    return found


def _refusal(loss: fx.Node, chain: list[fx.Node]) -> str | None:
    head, *between = chain
    if not is_call(head, aten.linear.default):
        return f"its logits come from {target_name(head)}, and not from a product with a weight"
    if len(args(head)) > 2 and args(head)[2] is not None:
        return "its head has a bias"
    if len(shape(between[-1] if between else head)) != 2 or len(shape(args(loss)[1])) != 1:
        return "it is not of logits (tokens, classes) and one class number for each token"
    if loss.target is not vocab_cross_entropy and cross_entropy_arguments(loss)[0] is not None:
        return "its classes have weights"
    classes = shape(head)[-1]
    if any(shape(node)[-1] != classes or is_call(node, aten.transpose.int) for node in between):
        return "its logits are cut or turned along their classes"
    casts = [node for node in between if node.target is aten.to.dtype]
    if any(dtype(node).itemsize < dtype(head).itemsize for node in casts):
        return "its logits are rounded before the loss"
    for node, reader in zip(chain, [*between, loss], strict=True):
        if others := [u for u in node.users if u is not reader and u.op != "output"]:
            return f"its logits are also read by {target_name(others[0])}"
    return None


def _fuse(program: Program, loss: fx.Node, chain: list[fx.Node]) -> fx.Node:
    head, *between = chain
    x, weight = args(head)[:2]
    if is_call(weight, aten.to.dtype) and args(weight)[0].op == "get_attr":
        weight = args(weight)[0]  # it casts while it works, and keeps no cast
    outputs = [node for node in chain if any(user.op == "output" for user in node.users)]
    hidden = x
    for node in between:
        if node.target is not aten.to.dtype:
            hidden = _view(program, loss, node, hidden)
    if loss.target is vocab_cross_entropy:
        options: tuple[Any, ...] = args(loss)[2:]
    else:
        options = (*cross_entropy_arguments(loss)[1:], "")
    new = insert_before(
        program, loss, linear_cross_entropy, hidden, weight, args(loss)[1], *options
    )
    take_name(new, loss)
    loss.replace_all_uses_with(new)
    for node in outputs:
        _give_logits(program, new, node, chain, x, weight)
    cast = args(head)[1]
    for node in (loss, *reversed(chain), *([] if cast is weight else [cast])):
        if not node.users:
            program.graph.erase_node(node)
    return new


def _view(program: Program, point: fx.Node, node: fx.Node, value: fx.Node) -> fx.Node:
    """Do with the hidden states, before `point`, what `node` does with the logits of them."""
    if node.target is aten.reshape.default:
        sizes = [*shape(node)[:-1], shape(value)[-1]]
        return insert_like(program, point, node, aten.reshape.default, value, sizes)
    return insert_like(program, point, node, node.target, value, *args(node)[1:], **node.kwargs)


def _give_logits(
    program: Program,
    point: fx.Node,
    node: fx.Node,
    chain: list[fx.Node],
    x: fx.Node,
    weight: fx.Node,
) -> None:
    """Put logits that are computed on demand in the place of an output."""
    logits = insert_before(program, point, output_logits, x, weight, True)
    take_name(logits, chain[0])
    for step in chain[1 : chain.index(node) + 1]:
        is_cast = step.target is aten.to.dtype
        new = (
            insert_before(program, point, aten.to.dtype, logits, dtype(step))
            if is_cast
            else _view(program, point, step, logits)
        )
        take_name(new, step)
        logits = new
    program.graph.output_node().replace_input_with(node, logits)

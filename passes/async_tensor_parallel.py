"""Asynchronous tensor parallelism: collectives of activations run beside the products next to them.

A late pass: it fuses what the search has placed and the casts have left, and nothing else.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ilm_compile.errors import PlanError
from ilm_compile.passes.base import Pass
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.dump import target_name
from ilm_compile.program.input_graph import reached
from ilm_compile.program.layout import layout_of
from ilm_compile.program.placement import Placement, S
from ilm_compile.program.program import Program
from ilm_compile.program.ring_products import gather_products, product_scatter
from ilm_compile.program.values import take_name
from ilm_compile.rewrite.edit import insert_like
from ilm_compile.rewrite.fusion import args, aten, is_call, only_user, shape
from ilm_compile.schedule import schedule_of

AXIS = "tp"


@dataclass(frozen=True, kw_only=True)
class AsyncTensorParallel(Pass):
    """Fuse each gather of tokens with the linear layers that read it, and each linear layer with
    the scatter of its sum.

    The pieces of the other ranks travel while those that are there are multiplied. Equal up to the
    order of sums; what is sent and what is kept for backward stay the same.
    """

    name: ClassVar[str] = "async-tensor-parallel"
    requires: ClassVar[frozenset[str]] = frozenset({"sharded"})
    after: ClassVar[frozenset[str]] = frozenset(
        {"fused", "cast", "masters", "checkpointed", "split", "placed", "residuals", "loss"}
    )
    ensures: ClassVar[frozenset[str]] = frozenset({"overlapped"})
    tolerance: ClassVar[float] = 1e-10

    def apply(self, program: Program) -> None:
        _refuse(program)
        left: Counter[str] = Counter()
        moves = [n for n in program.calls() if is_call(n, redistribute) and _is_ours(n)]
        gathers = [n for n in moves if _ends(n)[0].is_shard and _ends(n)[1].kind == "R"]
        scatters = [n for n in moves if _ends(n)[0].kind == "P" and _ends(n)[1].is_shard]
        fused = [0, 0]
        for number, (nodes, fuse_one) in enumerate(
            ((gathers, _fuse_gather), (scatters, _fuse_scatter))
        ):
            for node in nodes:
                if reason := fuse_one(program, node):
                    left[reason] += 1
                else:
                    fused[number] += 1
        if not any(fused):
            raise PlanError(
                f"{self.name}: expected gathers of tokens before linear layers, or scatters behind "
                f"them, found none{_said(left)}; take sequence_parallel=True, or leave "
                "async_tensor_parallel out"
            )
        program.decisions.append(
            f"{self.name}: {fused[0]} gathers run beside the products that read them, {fused[1]} "
            f"scatters beside the products that they add up{_said(left)}"
        )


def _refuse(program: Program) -> None:
    plan = program.plan
    others = [axis for axis in ("cp", "ep") if getattr(plan, axis) > 1]
    if others:
        raise PlanError(
            f"async-tensor-parallel: expected tokens that no axis but tp cuts, got {others[0]}="
            f"{getattr(plan, others[0])}; leave async_tensor_parallel out, or take {others[0]}=1"
        )
    if schedule_of(plan).splits_backwards:
        raise PlanError(
            f"async-tensor-parallel: the schedule {plan.schedule!r} leaves gradients of weights to "
            "W actions, and products that run beside a collective have theirs in B; leave "
            "async_tensor_parallel out, or take a schedule that does not split the backward"
        )


def _said(left: Counter[str]) -> str:
    return "".join(f"; {count} left, {reason}" for reason, count in sorted(left.items()))


def _ends(node: fx.Node) -> tuple[Placement, Placement]:
    src, dst = (Placement.parse(str(node.kwargs[key])) for key in ("src", "dst"))
    return src, dst


def _is_ours(node: fx.Node) -> bool:
    """Whether a collective moves an activation over the axis, cut by tokens."""
    src, dst = _ends(node)
    tokens = [place for place in (src, dst) if place.is_shard]
    is_plain = [place for place in tokens if place == S(place.dim)]
    last = len(shape(node)) - 1
    return (
        node.kwargs["axis"] == AXIS
        and args(node)[0].op == "call_function"
        and len(tokens) == len(is_plain) == 1
        and tokens[0].dim < last
    )


def _place(node: fx.Node) -> tuple[object, object]:
    return node.meta.get("stage"), node.meta["region"]


def _fuse_gather(program: Program, gather: fx.Node) -> str:
    """Fuse a gather with all who read it; return why not, "" if that is done."""
    readers = [node for node in program.graph.nodes if node in gather.users]
    for reader in readers:
        if not is_call(reader, aten.linear.default) or args(reader)[0] is not gather:
            return f"read by {target_name(reader) if reader.op == 'call_function' else reader.op}"
        rows = layout_of(args(reader)[1]).on(AXIS)
        if not rows.is_shard or rows.dim != 0:
            return "read by a product whose weight is not cut by rows"
        if rows != layout_of(args(readers[0])[1]).on(AXIS):
            return "read by products whose weights are cut in other ways"
        if _place(reader) != _place(gather):
            return "read in another block"
    operands = [(*args(reader), None)[1:3] for reader in readers]
    point = readers[0]
    given = [each for pair in operands for each in pair if isinstance(each, fx.Node)]
    late = {node for node in reached(given) if not node < point}
    if not late.isdisjoint(readers):
        return "read by a product whose weight another one makes"
    for node in [node for node in program.graph.nodes if node in late]:
        point.prepend(node)
    weights, biases = ([pair[i] for pair in operands] for i in (0, 1))
    src, _ = _ends(gather)
    inputs = (args(gather)[0], weights, biases, src.dim, AXIS)
    call = insert_like(program, point, point, gather_products, *inputs)
    call.meta["reason"] = gather.meta.get("reason", "")
    items = [
        insert_like(program, point, reader, operator.getitem, call, number)
        for number, reader in enumerate(readers)
    ]
    for item, reader in zip(items, readers, strict=True):
        _put(item, reader, reader)
    program.graph.erase_node(gather)
    return ""


def _fuse_scatter(program: Program, scatter: fx.Node) -> str:
    """Fuse a scatter with the product that it adds up; return why not, "" if that is done."""
    product = args(scatter)[0]
    if not is_call(product, aten.linear.default):
        return f"of what {target_name(product)} makes"
    if only_user(product) is not scatter:
        return "of a product that is read elsewhere too"
    if _place(product) != _place(scatter):
        return "of a product of another block"
    last = len(shape(product)) - 1
    x, weight, *bias = args(product)
    if layout_of(x).on(AXIS) != S(last) or layout_of(weight).on(AXIS) != S(1):
        return "of a product that is not cut by its sums"
    _, dst = _ends(scatter)
    inputs = (x, weight, bias[0] if bias else None, dst.dim, AXIS)
    call = insert_like(program, scatter, scatter, product_scatter, *inputs)
    call.meta["reason"] = scatter.meta.get("reason", "")
    _put(call, scatter, product)
    program.graph.erase_node(product)
    return ""


def _put(new: fx.Node, old: fx.Node, source: fx.Node) -> None:
    """Put a call in the place of another; the traced graph knows its value as that of `source`."""
    take_name(new, source)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)

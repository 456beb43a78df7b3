"""Faults that float64 does not show: values rounded to bfloat16 where they should not be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx

from ilm_compile.ops.precision import NORM
from ilm_compile.program.program import Program
from ilm_compile.proof.mutate_places import (
    CAST,
    Kind,
    Place,
    aten,
    calls,
    counts,
    leave_out,
    like,
    put,
    reroute,
    value_of,
    without_parameters,
)
from ilm_compile.proof.mutate_values import sums
from ilm_compile.rewrite.parameter_free import precision_of

LAST_EXACT = 256  # the last of the integers that bfloat16 has without gaps


def skip_cast(program: Program) -> Iterator[Place]:
    """A value goes on in the dtype it had before the cast."""
    for node in calls(program, CAST):
        source, value = node.all_input_nodes[0].meta["val"], node.meta["val"]
        if source.dtype != value.dtype:
            yield node, f"{source.dtype} to {value.dtype}", leave_out


def _rounding(find: Callable[[Program], Iterable[fx.Node]]) -> Callable[[Program], Iterator[Place]]:
    """Return the kind that rounds what `find` yields, where it is float32 and not rounded yet."""

    def edit(program: Program, node: fx.Node) -> None:
        narrow = like(program, node, CAST, torch.bfloat16)

        def rounded(user: fx.Node) -> fx.Node:
            short = narrow(user)
            placed = short.meta.get("layout")
            return put(program, user, CAST, short, torch.float32, placed=placed)

        reroute(program, node, rounded)

    def places(program: Program) -> Iterator[Place]:
        for node in find(program):
            value = value_of(node)
            if value is not None and value.dtype == torch.float32 and not _is_rounded(node):
                yield node, "", edit

    return places


def _is_rounded(node: fx.Node) -> bool:
    """Whether the value has the digits of a bfloat16 already."""
    while node.target is CAST:
        node = node.all_input_nodes[0]
        if node.meta["val"].dtype == torch.bfloat16:
            return True
    return False


def _positions(program: Program) -> Iterator[fx.Node]:
    for node in without_parameters(program):
        source = value_of(node.all_input_nodes[0]) if node.all_input_nodes else None
        is_made = node.target is CAST and source is not None and not source.is_floating_point()
        if is_made and max(node.meta["val"].shape, default=0) > LAST_EXACT:
            yield node


def _tables(program: Program) -> Iterator[fx.Node]:
    free = set(without_parameters(program))
    return (n for n in calls(program, aten.cos.default, aten.sin.default) if n in free)


def _norm_inputs(program: Program) -> Iterator[fx.Node]:
    for node in program.calls():
        if precision_of(node, ()) is NORM:
            yield node.all_input_nodes[0]


def _logits(program: Program) -> Iterator[fx.Node]:
    for node in program.calls():
        if "cross_entropy" in str(node.target) or "cross_entropy" in node.name:
            yield node.all_input_nodes[0]


KINDS: dict[str, Kind] = {
    "skip a cast": skip_cast,
    "round the residual stream": _rounding(sums),
    "round positions": _rounding(_positions),
    "round the target count": _rounding(counts),
    "round rotary tables": _rounding(_tables),
    "round a norm's input": _rounding(_norm_inputs),
    "round logits": _rounding(_logits),
}

"""A sum with the residual stream and the norm that follows it, as one op: `ilm::add_rms_norm`
or `ilm::add_layer_norm`.

The last pass of all. Fused, the sum is made where its norm is: the two terms go from one block to
the next in the place of their sum. That is free inside a stage, but a stage would receive two
values and not one, and a recomputed block would keep two. Which blocks are recomputed and where the
stages begin must therefore be known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from ilm_compile.passes.base import Pass
from ilm_compile.passes.fuse_kernels import report
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.dump import target_name
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program
from ilm_compile.rewrite.fusion import (
    Found,
    Left,
    args,
    aten,
    comes_before_users,
    dtype,
    fuse,
    ilm,
    is_call,
    is_mutated,
    shape,
)

FUSED: dict[Any, Any] = {
    ilm.rms_norm.default: ilm.add_rms_norm.default,
    ilm.layer_norm.default: ilm.add_layer_norm.default,
}
BETWEEN = (redistribute, aten.to.dtype)


@dataclass(frozen=True, kw_only=True)
class FuseResidual(Pass):
    """Replace a sum and the `ilm::rms_norm` or `ilm::layer_norm` of it by one op; who else uses the
    sum reads its second result. Equal up to the rounding of the gradient's sum in bfloat16."""

    name: ClassVar[str] = "fuse-residual"
    after: ClassVar[frozenset[str]] = frozenset(
        {"fused", "sharded", "cast", "checkpointed", "split"}
    )
    ensures: ClassVar[frozenset[str]] = frozenset({"residuals"})
    numerics: ClassVar[Literal["preserving", "changing"]] = "changing"
    tolerance: ClassVar[float] = 2e-3

    def apply(self, program: Program) -> None:
        for target, op in FUSED.items():
            norms = program.graph.find_nodes(op="call_function", target=target)
            if norms or target is ilm.rms_norm.default:
                name = op.name().removeprefix("ilm::")
                report(program, self.name, name, _fuse_all(program, norms, op, name))


def _fuse_all(program: Program, norms: Iterable[fx.Node], op: Any, name: str) -> Found:
    fused: list[fx.Node] = []
    left: list[Left] = []
    for norm in norms:
        total = args(norm)[0]
        if is_call(total, *BETWEEN) and is_call(args(total)[0], aten.add.Tensor):
            between = f"{target_name(total)} stands between its sum and its norm"
            left.append(Left(name, args(total)[0], between))
        if not is_call(total, aten.add.Tensor):
            continue
        if reason := _refusal(program, total, norm):
            left.append(Left(name, total, reason))
        else:
            fused.append(_fuse(program, total, norm, op))
    return Found(tuple(fused), tuple(left))


def _refusal(program: Program, total: fx.Node, norm: fx.Node) -> str | None:
    terms = args(total)[:2]
    if not all(isinstance(term, fx.Node) for term in terms) or total.kwargs.get("alpha", 1) != 1:
        return "it adds no two tensors of equal weight"
    if any(shape(term) != shape(total) or dtype(term) != dtype(total) for term in terms):
        kinds = " and ".join(f"{list(shape(term))} {dtype(term)}" for term in terms)
        return f"its terms are not alike: {kinds}"
    if any(layout_of(term) != layout_of(total) for term in terms):
        return "its terms are not placed as their sum"
    if is_mutated(total):
        return "its sum is changed in place"
    if not comes_before_users(norm, [total]):
        return "its sum is used before the norm"
    if total.meta.get("stage") != norm.meta.get("stage"):
        return "its norm begins the next stage, which would receive two values and not their sum"
    here, there = total.meta["region"], norm.meta["region"]
    next_one = program.regions[there]
    if here != there and (next_one.recompute or next_one.selective):
        return "its norm begins a recomputed block, which would keep two values and not their sum"
    return None


def _fuse(program: Program, total: fx.Node, norm: fx.Node, op: Any) -> fx.Node:
    residual, x = _in_order(*args(total)[:2])
    return fuse(program, op, (x, residual, *args(norm)[1:]), [norm, total], point=norm)


def _in_order(first: fx.Node, second: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the older of two terms first: the residual stream, then what a layer made of it."""
    return (second, first) if second < first else (first, second)

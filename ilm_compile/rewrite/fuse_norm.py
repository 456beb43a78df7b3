"""Where a program computes an RMSNorm: `aten.rms_norm`, or the calls that Hugging Face writes; and
where a LayerNorm, `aten.layer_norm`.

The spelled-out form is mul(x, rsqrt(mean(x^2, -1) + eps)), often between a cast to float32 and one
back, and then times a weight (Llama) or 1 + weight (Gemma), before or after the cast back. The
fused op computes in float32 inside (float64 stays), so casts around it go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import torch
from torch import fx

from ilm_compile.kernels import MAX_CENTERED, MAX_HIDDEN
from ilm_compile.program.arguments import argument
from ilm_compile.program.program import Program
from ilm_compile.rewrite.fusion import (
    LOW_PRECISION,
    Found,
    Left,
    args,
    aten,
    dtype,
    fuse,
    ilm,
    is_call,
    only_user,
    other_operand,
    shape,
)

CAST = aten.to.dtype
SUMS = (aten.add.Tensor, aten.add.Scalar)
Reader = Callable[[fx.Node], "Norm | str | None"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm from its input `x` to its `result`; the other fields as the op takes them."""

    x: fx.Node
    result: fx.Node
    eps: float
    weight: fx.Node | None = None
    weight_offset: float = 0.0
    cast_before_scale: bool = False
    bias: fx.Node | None = None
    centered: bool = False  # a LayerNorm


def fuse_rms_norms(program: Program) -> Found:
    """Replace the RMSNorms over the last dimension by `ilm::rms_norm`."""
    return _fuse(program, "rms_norm", {aten.rms_norm.default: _whole, aten.rsqrt.default: _spelled})


def fuse_layer_norms(program: Program) -> Found:
    """Replace the LayerNorms over the last dimension by `ilm::layer_norm`."""
    return _fuse(program, "layer_norm", {aten.layer_norm.default: _whole})


def _fuse(program: Program, name: str, readers: dict[Any, Reader]) -> Found:
    fused: list[fx.Node] = []
    left: list[Left] = []
    for node in list(program.calls()):
        read = next((r for op, r in readers.items() if is_call(node, op)), None)
        norm = read(node) if read else None
        reason = norm if isinstance(norm, str) else norm and _refusal(program, norm)
        if reason:
            left.append(Left(name, node, reason))
        elif isinstance(norm, Norm):
            op: Any = ilm.rms_norm.default
            inputs = [norm.x, norm.weight, norm.eps, norm.cast_before_scale, norm.weight_offset]
            if norm.centered:
                op, inputs = ilm.layer_norm.default, [norm.x, norm.weight, norm.bias, norm.eps]
            fused.append(fuse(program, op, inputs, [norm.result], point=norm.result))
    return Found(tuple(fused), tuple(left))


def _whole(node: fx.Node) -> Norm | str:
    """Read an `aten.rms_norm` or `aten.layer_norm`."""
    if len(argument(node, "normalized_shape")) != 1:
        return "it norms over several dimensions, the fused op over the last alone"
    x, weight, eps = (argument(node, name) for name in ("input", "weight", "eps"))
    if eps is None:  # torch takes that of the dtype
        eps = torch.finfo(dtype(x)).eps
    centered = is_call(node, aten.layer_norm.default)
    bias = argument(node, "bias") if centered else None
    return _widest([Norm(x, node, eps, weight, bias=bias, centered=centered)], x, {node})


def _spelled(node: fx.Node) -> Norm | str | None:
    """Read the calls around an rsqrt; None if they have nothing of a norm."""
    total = args(node)[0]
    if not is_call(total, *SUMS) or not is_call(args(total)[0], aten.mean.dim):
        return None
    mean, eps = args(total)[:2]
    square = args(mean)[0]
    x = _squared(square)
    if x is None:
        return None
    dims = [dim % len(shape(x)) for dim in argument(mean, "dim") or range(len(shape(x)))]
    if dims != [len(shape(x)) - 1]:
        return (
            f"its mean is over dimensions {dims} of {len(shape(x))}, the fused op's over the last"
        )
    if not isinstance(eps, (int, float)):
        return "its eps is a tensor, the fused op takes a number"
    scaled = only_user(node)
    if not is_call(scaled, aten.mul.Tensor) or other_operand(scaled, node) is not x:
        return "its 1/rms does more than scale its input"
    if any(only_user(inner) is None for inner in (square, mean, total)):
        return "a value inside it is used elsewhere too"
    return _widest(_scaled(Norm(x, scaled, float(eps))), x, {square, scaled})


def _squared(node: fx.Node) -> fx.Node | None:
    """Return what `node` is the square of."""
    is_square = is_call(node, aten.pow.Tensor_Scalar) and args(node)[1] == 2
    is_square |= is_call(node, aten.square.default)
    is_square |= is_call(node, aten.mul.Tensor) and args(node)[0] is args(node)[1]
    squared: fx.Node | None = args(node)[0] if is_square else None
    return squared


def _scaled(norm: Norm) -> list[Norm]:
    """Return the norm without and, where it is multiplied by one, with a weight."""
    found = [norm]
    cast = only_user(norm.result)
    if is_call(cast, CAST):
        low = dtype(cast) in LOW_PRECISION
        norm = changed(norm, result=cast, cast_before_scale=low)
        found.append(changed(norm, cast_before_scale=False))
    product = only_user(norm.result)
    if is_call(product, aten.mul.Tensor):
        factor = other_operand(product, norm.result)
        if isinstance(factor, fx.Node) and shape(factor) == shape(norm.x)[-1:]:
            weight, offset = _weight(factor)
            found.append(changed(norm, result=product, weight=weight, weight_offset=offset))
    return found


def _weight(factor: fx.Node) -> tuple[fx.Node, float]:
    """Read w or number + w, each of them perhaps cast."""
    offset = 0.0
    if is_call(factor, *SUMS) and isinstance(args(factor)[1], (int, float)):
        factor, offset = args(factor)[0], float(args(factor)[1])
    return factor, offset


def _widest(norms: list[Norm], x: fx.Node, inside: set[fx.Node]) -> Norm | str:
    """Return the widest form whose result has the dtype of its input, casts around it included.

    inside: who uses `x` for the norm; a cast that makes it for others too is no part of the norm.
    """
    cast = only_user(norms[-1].result)
    if is_call(cast, CAST):
        norms = [*norms, changed(norms[-1], result=cast)]
    sources = [x]
    if is_call(x, CAST) and inside.issuperset(x.users):
        sources.insert(0, args(x)[0])
    for norm in reversed(norms):
        for source in sources:
            if dtype(source) == dtype(norm.result):
                weight, bias = (_uncast(w, dtype(source)) for w in (norm.weight, norm.bias))
                return changed(norm, x=source, weight=weight, bias=bias)
    return f"it gives {dtype(norms[-1].result)} of {dtype(x)}, the fused op gives what it is given"


def _uncast(weight: fx.Node | None, wanted: torch.dtype) -> fx.Node | None:
    """Return the weight before a cast, if the op takes it in that dtype: of x, or float32."""
    if is_call(weight, CAST) and dtype(args(weight)[0]) in (wanted, torch.float32):
        weight = args(weight)[0]
    return weight


def _refusal(program: Program, norm: Norm) -> str | None:
    """Return why a norm that the op could compute is better left alone."""
    widest = MAX_CENTERED if norm.centered else MAX_HIDDEN
    if shape(norm.x)[-1] > widest:
        return f"its rows have {shape(norm.x)[-1]} numbers, the kernel takes {widest}"
    if norm.bias is not None and (norm.weight is None or dtype(norm.bias) != dtype(norm.weight)):
        return "its bias is not of the dtype of its weight"
    if norm.weight is not None and dtype(norm.weight) not in (dtype(norm.x), torch.float32):
        return f"its weight is {dtype(norm.weight)}, expected {dtype(norm.x)} or float32"
    splits = [is_call(user, aten.reshape.default) for user in norm.result.users]
    if program.plan.tp > 1 and is_call(norm.x, aten.linear.default) and splits and all(splits):
        return "it norms all heads at once, which tensor parallelism divides: their mean is a sum"
    return None

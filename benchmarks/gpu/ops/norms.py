"""The norms and gated units. Shapes in this file: rows (R, N), weights (N,)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.ops.op import EPS, HIDDEN_SIZES, KernelOp, Maker, Tensors
from ilm_compile import kernels
from ilm_compile.kernels import MAX_CENTERED as WIDEST


def rms_norm(
    *,
    weight_dtype: torch.dtype | None = None,
    has_weight: bool = True,
    cast: bool = False,
    offset: float = 0.0,
    widths: Sequence[int] = HIDDEN_SIZES,
) -> KernelOp:
    """weight_dtype: None for that of x."""

    def inputs(make: Maker, rows: int, width: int) -> Tensors:
        weight = {"weight": make.weight(width, weight_dtype)} if has_weight else {}
        return {"x": make.normal(rows, width), **weight}

    trained = ("x", "weight") if has_weight else ("x",)
    return KernelOp(
        inputs=inputs,
        fused=lambda t: (kernels.rms_norm(t["x"], t.get("weight"), EPS, cast, offset),),
        plain=lambda t: (_plain_norm(t["x"], t.get("weight"), cast, offset, t["x"].dtype),),
        outputs=("y",),
        trained=trained,
        kept=trained,
        written=trained,
        widths=widths,
    )


def add_rms_norm(
    *, residual_dtype: torch.dtype | None = None, widths: Sequence[int] = HIDDEN_SIZES
) -> KernelOp:
    """residual_dtype: None for that of x; with another, x has a gradient of its own."""

    def inputs(make: Maker, rows: int, width: int) -> Tensors:
        return {
            "x": make.normal(rows, width),
            "residual": make.normal(rows, width, dtype=residual_dtype),
            "weight": make.weight(width, None),
        }

    def plain(t: Tensors) -> tuple[Tensor, ...]:
        total = t["x"] + t["residual"]
        return _plain_norm(total, t["weight"], False, 0.0, t["x"].dtype), total

    return KernelOp(
        inputs=inputs,
        fused=lambda t: kernels.add_rms_norm(t["x"], t["residual"], t["weight"], EPS),
        plain=plain,
        outputs=("y", "sum"),
        trained=("x", "residual", "weight"),
        kept=("sum", "weight"),
        written=("residual", "weight") if residual_dtype is None else ("x", "residual", "weight"),
        widths=widths,
    )


def add_layer_norm(
    *, has_bias: bool = True, widths: Sequence[int] = tuple(n for n in HIDDEN_SIZES if n <= WIDEST)
) -> KernelOp:
    def inputs(make: Maker, rows: int, width: int) -> Tensors:
        bias = {"bias": make.normal(width)} if has_bias else {}
        found = {name: make.normal(rows, width) for name in ("x", "residual")}
        return {**found, "weight": make.weight(width, None), **bias}

    def plain(t: Tensors) -> tuple[Tensor, ...]:
        total = t["x"] + t["residual"]
        return F.layer_norm(total, total.shape[-1:], t["weight"], t.get("bias"), EPS), total

    scale = ("weight", "bias") if has_bias else ("weight",)
    return KernelOp(
        inputs=inputs,
        fused=lambda t: kernels.add_layer_norm(
            t["x"], t["residual"], t["weight"], t.get("bias"), EPS
        ),
        plain=plain,
        outputs=("y", "sum"),
        trained=("x", "residual", *scale),
        kept=("sum", "weight"),
        written=("residual", *scale),
        widths=widths,
    )


def glu(activation: str = "silu", *, widths: Sequence[int] = HIDDEN_SIZES) -> KernelOp:
    plain = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
    }[activation]
    return KernelOp(
        inputs=lambda make, rows, width: {n: make.normal(rows, width) for n in ("gate", "up")},
        fused=lambda t: (kernels.glu(t["gate"], t["up"], activation),),
        plain=lambda t: (plain(t["gate"]) * t["up"],),
        outputs=("y",),
        trained=("gate", "up"),
        kept=("gate", "up"),
        written=("gate", "up"),
        widths=widths,
    )


def _plain_norm(
    x: Tensor, weight: Tensor | None, cast: bool, offset: float, dtype: torch.dtype
) -> Tensor:
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    if weight is None:
        return unit.to(dtype)
    if cast:
        return unit.to(dtype) * (weight + offset).to(dtype)
    return (unit * (weight.float() + offset)).to(dtype)

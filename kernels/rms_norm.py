"""The op `ilm::rms_norm`: y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset), row by row.

It computes in float32 (float64 stays float64) and rounds to the dtype of x. Two conventions differ
in where: Hugging Face's Llama rounds the normalised value before it multiplies by the weight
(`cast_before_scale`), torch's F.rms_norm and Gemma (`weight_offset` 1) round once, at the end.

The backward reads the rows of x anyway, so it computes 1/sqrt(...) again instead of saving it.

Shapes in this file: x (..., H), weight (H,), H at most MAX_HIDDEN.
"""

from typing import Any

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import differentiable, exact_dtype, implement

# One program of the Triton kernels holds a row in registers, and wider rows do not fit.
MAX_HIDDEN = 16384

torch.library.define(
    "ilm::rms_norm",
    "(Tensor x, Tensor? weight, float eps, bool cast_before_scale=False, float weight_offset=0.0)"
    " -> Tensor",
)
torch.library.define(
    "ilm::rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, float eps, bool cast_before_scale,"
    " float weight_offset) -> (Tensor, Tensor)",
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool = False,
    weight_offset: float = 0.0,
) -> Tensor:
    """Root-mean-square normalisation of every row, scaled by `weight + weight_offset`.

    x: (..., H) of any floating dtype and strides. weight: (H,) in the dtype of x or float32, or
    None for no scale. Returns a contiguous tensor of x's shape and dtype. Differentiable once.
    Raises IlmCompileError for other shapes or dtypes, and for H above MAX_HIDDEN.
    """
    result: Tensor = torch.ops.ilm.rms_norm(x, weight, eps, cast_before_scale, weight_offset)
    return result


def check_norm(
    op: str, x: Tensor, weight: Tensor | None, weight_offset: float, widest: int = MAX_HIDDEN
) -> None:
    """Raise IlmCompileError unless x (..., H) and weight are what the norms take."""

    def refuse(expected: str) -> IlmCompileError:
        given = f"x {tuple(x.shape)} {x.dtype}"
        if weight is not None:
            given += f", weight {tuple(weight.shape)} {weight.dtype}"
        return IlmCompileError(f"{op}: expected {expected}; got {given}")

    if x.dim() == 0 or not x.dtype.is_floating_point:
        raise refuse("x (..., hidden) of a floating dtype")
    if not 1 <= x.shape[-1] <= widest:
        raise refuse(f"a hidden size of 1 to {widest} (use torch's norm above it)")
    if weight is None and weight_offset != 0:
        raise refuse(f"a weight, as weight_offset is {weight_offset}")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise refuse(f"a weight of shape ({x.shape[-1]},)")
    if weight is not None and weight.dtype not in (x.dtype, torch.float32):
        raise refuse(f"a weight of {x.dtype} or torch.float32")


def normalise(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
    dtype: torch.dtype,
) -> Tensor:
    """The norm of x in plain torch, rounded to `dtype`."""
    exact = exact_dtype(x)
    unit, _ = _unit_rows(x.to(exact), eps)
    if weight is None:
        return unit.to(dtype).contiguous()
    if cast_before_scale:
        unit = unit.to(dtype).to(exact)
    return (unit * (weight.to(exact) + weight_offset)).to(dtype).contiguous()


def normalise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, unrounded, and of the weight (no elements without one), in plain torch.

    With r = 1/sqrt(mean(x^2) + eps), u = x r and g = grad (weight + offset):
    dx = r (g - u mean(g u)) and dweight = sum over rows of grad u (arXiv:1910.07467, section 4.1).
    The rounding of u before the scale counts as the identity.
    """
    exact = exact_dtype(x)
    unit, rstd = _unit_rows(x.to(exact), eps)
    scaled = grad.to(exact)
    grad_weight = x.new_empty(0)
    if weight is not None:
        seen = unit.to(grad.dtype).to(exact) if cast_before_scale else unit
        grad_weight = (scaled * seen).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        scaled = scaled * (weight.to(exact) + weight_offset)
    grad_x = rstd * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    return grad_x, grad_weight


def _unit_rows(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows of root mean square 1, and what each was multiplied by, (..., 1)."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def _forward(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool = False,
    weight_offset: float = 0.0,
) -> Tensor:
    check_norm("ilm::rms_norm", x, weight, weight_offset)
    return normalise(x, weight, eps, cast_before_scale, weight_offset, x.dtype)


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    found = normalise_backward(grad, x, weight, eps, cast_before_scale, weight_offset)
    return found[0].to(x.dtype).contiguous(), found[1]


def _forward_fake(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool = False,
    weight_offset: float = 0.0,
) -> Tensor:
    check_norm("ilm::rms_norm", x, weight, weight_offset)
    return x.new_empty(x.shape)


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    grad_weight = x.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), grad_weight


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *options = inputs
    ctx.save_for_backward(x, weight)
    ctx.options = options


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight = torch.ops.ilm.rms_norm_backward(grad, x, weight, *ctx.options)
    return grad_x, None if weight is None else grad_weight, None, None, None


implement("ilm::rms_norm", _forward, "ilm_compile.kernels.triton_rms_norm:rms_norm")
implement(
    "ilm::rms_norm_backward", _backward, "ilm_compile.kernels.triton_rms_norm:rms_norm_backward"
)
torch.library.register_fake("ilm::rms_norm", _forward_fake)
torch.library.register_fake("ilm::rms_norm_backward", _backward_fake)
differentiable("ilm::rms_norm", _save_inputs, _differentiate)

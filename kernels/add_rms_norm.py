"""The op `ilm::add_rms_norm`: a residual stream takes one more term and is normalised, in one pass.

sum = x + residual in the dtype of the residual, y = rms_norm(sum) in the dtype of x: the stream may
stay in float32 while the layers compute in bfloat16. The norm sees the rounded sum, as it would if
the two were separate ops.

Shapes in this file: x, residual, y, sum (..., H), weight (H,), H at most MAX_HIDDEN.
"""

from typing import Any

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import differentiable, exact_dtype, implement
from ilm_compile.kernels.rms_norm import check_norm, normalise, normalise_backward

torch.library.define(
    "ilm::add_rms_norm",
    "(Tensor x, Tensor residual, Tensor? weight, float eps, bool cast_before_scale=False,"
    " float weight_offset=0.0) -> (Tensor, Tensor)",
)
torch.library.define(
    "ilm::add_rms_norm_backward",
    "(Tensor grad, Tensor? grad_sum, Tensor total, Tensor? weight, float eps,"
    " bool cast_before_scale, float weight_offset) -> (Tensor, Tensor, Tensor)",
)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool = False,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), read and written once.

    x, residual: (..., H) of one shape and any strides; the residual in the dtype of x or float32.
    weight and options: as for `rms_norm`. Returns y in the dtype of x and the sum in that of the
    residual, both contiguous. Differentiable once. Raises IlmCompileError for other inputs.
    """
    y, total = torch.ops.ilm.add_rms_norm(
        x, residual, weight, eps, cast_before_scale, weight_offset
    )
    return y, total


def _check(x: Tensor, residual: Tensor, weight: Tensor | None, weight_offset: float) -> None:
    check_norm("ilm::add_rms_norm", x, weight, weight_offset)
    if residual.shape != x.shape or residual.dtype not in (x.dtype, torch.float32):
        raise IlmCompileError(
            f"ilm::add_rms_norm: expected a residual of x's shape, in the dtype of x or "
            f"torch.float32; got x {tuple(x.shape)} {x.dtype}, residual {tuple(residual.shape)} "
            f"{residual.dtype}"
        )


def _forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool = False,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight, weight_offset)
    exact = exact_dtype(x, residual)
    total = (x.to(exact) + residual.to(exact)).to(residual.dtype).contiguous()
    return normalise(total, weight, eps, cast_before_scale, weight_offset, x.dtype), total


def _backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the residual, of x where its dtype is another, and of the weight."""
    through, grad_weight = normalise_backward(
        grad, total, weight, eps, cast_before_scale, weight_offset
    )
    if grad_sum is not None:
        through = through + grad_sum.to(through.dtype)
    same = grad.dtype == total.dtype
    grad_x = grad.new_empty(0) if same else through.to(grad.dtype).contiguous()
    return through.to(total.dtype).contiguous(), grad_x, grad_weight


def _forward_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool = False,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight, weight_offset)
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


def _backward_fake(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = grad.new_empty(0 if grad.dtype == total.dtype else grad.shape)
    grad_weight = total.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return total.new_empty(total.shape), grad_x, grad_weight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight, *options = inputs
    ctx.save_for_backward(output[1], weight)
    ctx.options = options
    ctx.dtype = x.dtype
    # The last norm of a model leaves the sum unused: its gradient is None then, not zeros.
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_sum: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    if grad is None:
        grad_x = None if grad_sum is None else grad_sum.to(ctx.dtype)
        return grad_x, grad_sum, None, None, None, None
    grad_residual, grad_x, grad_weight = torch.ops.ilm.add_rms_norm_backward(
        grad, grad_sum, total, weight, *ctx.options
    )
    if ctx.dtype == total.dtype:
        grad_x = grad_residual
    return grad_x, grad_residual, None if weight is None else grad_weight, None, None, None


implement("ilm::add_rms_norm", _forward, "ilm_compile.kernels.triton_rms_norm:add_rms_norm")
implement(
    "ilm::add_rms_norm_backward",
    _backward,
    "ilm_compile.kernels.triton_rms_norm:add_rms_norm_backward",
)
torch.library.register_fake("ilm::add_rms_norm", _forward_fake)
torch.library.register_fake("ilm::add_rms_norm_backward", _backward_fake)
differentiable("ilm::add_rms_norm", _save, _differentiate)

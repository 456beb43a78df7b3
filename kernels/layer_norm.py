"""The ops `ilm::layer_norm` and `ilm::add_layer_norm`: y = (x - mean) / std * weight + bias.

Layer normalisation (arXiv:1607.06450), std = sqrt(mean((x - mean)^2) + eps), and the same of a sum
with the residual stream in one pass, as `ilm::add_rms_norm` has it. They compute in float32
(float64 stays float64) and round once. The backward reads the rows anyway, and computes mean and
std again instead of saving them.

Shapes in this file: x, residual, y, sum (..., H), weight, bias (H,), H at most MAX_CENTERED.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import differentiable, exact_dtype, implement
from ilm_compile.kernels.rms_norm import check_norm

# Rows of which a program of the Triton kernels keeps all numbers until it knows their mean.
MAX_CENTERED = 8192

_SCALE = "Tensor? weight, Tensor? bias, float eps"
torch.library.define("ilm::layer_norm", f"(Tensor x, {_SCALE}) -> Tensor")
torch.library.define(
    "ilm::add_layer_norm", f"(Tensor x, Tensor residual, {_SCALE}) -> (Tensor, Tensor)"
)
# Of both: `total` is what is normalised, and has the gradient `grad_sum` beside the norm's.
torch.library.define(
    "ilm::layer_norm_backward",
    "(Tensor grad, Tensor? grad_sum, Tensor total, Tensor? weight, bool has_bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalisation over the last dimension.

    x: (..., H) of any floating dtype and strides. weight, bias: (H,) of one dtype, that of x or
    float32, or None; a bias needs a weight. Returns a contiguous tensor of x's shape and dtype.
    Differentiable once. Raises IlmCompileError for other inputs, and for H above MAX_CENTERED.
    """
    result: Tensor = torch.ops.ilm.layer_norm(x, weight, bias, eps)
    return result


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual), read and written once.

    x, residual: (..., H) of one shape and dtype and any strides. weight, bias: as for `layer_norm`.
    Returns both contiguous. Differentiable once. Raises IlmCompileError for other inputs.
    """
    y, total = torch.ops.ilm.add_layer_norm(x, residual, weight, bias, eps)
    return y, total


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    check_norm(op, x, weight, 0.0, MAX_CENTERED)
    if bias is not None and (
        weight is None or bias.shape != weight.shape or bias.dtype != weight.dtype
    ):
        given = "no weight" if weight is None else f"weight {tuple(weight.shape)} {weight.dtype}"
        raise IlmCompileError(
            f"{op}: expected a bias like the weight; got {given}, bias {tuple(bias.shape)} "
            f"{bias.dtype}"
        )


def _check_sum(x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    _check("ilm::add_layer_norm", x, weight, bias)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise IlmCompileError(
            f"ilm::add_layer_norm: expected a residual like x; got x {tuple(x.shape)} {x.dtype}, "
            f"residual {tuple(residual.shape)} {residual.dtype}"
        )


def _forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _check("ilm::layer_norm", x, weight, bias)
    exact = exact_dtype(x)
    scale, shift = (None if t is None else t.to(exact) for t in (weight, bias))
    return F.layer_norm(x.to(exact), x.shape[-1:], scale, shift, eps).to(x.dtype).contiguous()


def _add_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    _check_sum(x, residual, weight, bias)
    total = (x + residual).contiguous()
    return _forward(total, weight, bias, eps), total


def _backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what is normalised, of the weight and of the bias (no elements without one).

    With u = (x - mean) / std and g = grad * weight: dx = (g - mean(g) - u mean(g u)) / std, and
    dweight, dbias = sums over rows of grad u and of grad.
    """
    exact = exact_dtype(total)
    centered = total.to(exact) - total.to(exact).mean(-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    unit, scaled = centered * rstd, grad.to(exact)
    grad_weight, grad_bias = (total.new_empty(0) for _ in range(2))
    if weight is not None:
        rows = (-1, total.shape[-1])
        grad_weight = (scaled * unit).reshape(rows).sum(0).to(weight.dtype)
        if has_bias:
            grad_bias = scaled.reshape(rows).sum(0).to(weight.dtype)
        scaled = scaled * weight.to(exact)
    along = scaled.mean(-1, keepdim=True) + unit * (scaled * unit).mean(-1, keepdim=True)
    through = rstd * (scaled - along)
    if grad_sum is not None:
        through = through + grad_sum.to(exact)
    return through.to(total.dtype).contiguous(), grad_weight, grad_bias


def _forward_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    _check("ilm::layer_norm", x, weight, bias)
    return x.new_empty(x.shape)


def _add_forward_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    _check_sum(x, residual, weight, bias)
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _backward_fake(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (weight is not None, weight is not None and has_bias)
    like = total if weight is None else weight
    grads = (like.new_empty(like.shape if wanted else 0) for wanted in sizes)
    return total.new_empty(total.shape), *grads  # type: ignore[return-value]


def _keep(ctx: Any, total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    ctx.save_for_backward(total, weight)
    ctx.options = (bias is not None, eps)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _keep(ctx, *inputs)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _keep(ctx, output[1], *inputs[2:])
    # The last norm of a model leaves the sum unused: its gradient is None then, not zeros.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _through(ctx, grad, None)


def _differentiate_sum(
    ctx: Any, grad: Tensor | None, grad_sum: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return grad_sum, grad_sum, None, None, None
    grad_x, *others = _through(ctx, grad, grad_sum)
    return grad_x, grad_x, *others


def _through(ctx: Any, grad: Tensor, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    has_bias, eps = ctx.options
    found = torch.ops.ilm.layer_norm_backward(grad, grad_sum, total, weight, has_bias, eps)
    return found[0], found[1] if weight is not None else None, found[2] if has_bias else None, None


_LAUNCHERS = "ilm_compile.kernels.triton_layer_norm"
implement("ilm::layer_norm", _forward, f"{_LAUNCHERS}:layer_norm")
implement("ilm::add_layer_norm", _add_forward, f"{_LAUNCHERS}:add_layer_norm")
implement("ilm::layer_norm_backward", _backward, f"{_LAUNCHERS}:layer_norm_backward")
torch.library.register_fake("ilm::layer_norm", _forward_fake)
torch.library.register_fake("ilm::add_layer_norm", _add_forward_fake)
torch.library.register_fake("ilm::layer_norm_backward", _backward_fake)
differentiable("ilm::layer_norm", _save, _differentiate)
differentiable("ilm::add_layer_norm", _save_sum, _differentiate_sum)

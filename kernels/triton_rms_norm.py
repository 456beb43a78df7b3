"""`ilm::rms_norm` and `ilm::add_rms_norm` in Triton: import it lazily."""

from torch import Tensor

from ilm_compile.kernels.triton_norm import Norm, backward, forward


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool = False,
    weight_offset: float = 0.0,
) -> Tensor:
    """`ilm::rms_norm` of any strides. Returns a contiguous tensor like x."""
    return forward(Norm(eps, cast_before_scale, weight_offset), x, None, weight)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool = False,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """`ilm::add_rms_norm`: the norm in the dtype of x, the sum in that of the residual."""
    return forward(Norm(eps, cast_before_scale, weight_offset), x, residual, weight)


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """`ilm::rms_norm_backward`: gradients of x, contiguous, and of the weight."""
    norm = Norm(eps, cast_before_scale, weight_offset)
    grad_x, _, grad_weight, _ = backward(norm, grad, None, x, weight)
    return grad_x, grad_weight


def add_rms_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ilm::add_rms_norm_backward`: gradients of the residual, of x if of another dtype, weight."""
    norm = Norm(eps, cast_before_scale, weight_offset)
    return backward(norm, grad, grad_sum, total, weight)[:3]

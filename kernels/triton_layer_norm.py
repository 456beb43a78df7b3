"""`ilm::layer_norm` and `ilm::add_layer_norm` in Triton: import it lazily."""

from torch import Tensor

from ilm_compile.kernels.triton_norm import Norm, backward, forward


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`ilm::layer_norm` of any strides. Returns a contiguous tensor like x."""
    return forward(Norm(eps, centered=True), x, None, weight, bias)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """`ilm::add_layer_norm`: the norm and the sum."""
    return forward(Norm(eps, centered=True), x, residual, weight, bias)


def layer_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    has_bias: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ilm::layer_norm_backward`: gradients of what is normalised, of the weight, of the bias."""
    norm = Norm(eps, centered=True)
    grad_x, _, *others = backward(norm, grad, grad_sum, total, weight, has_bias)
    return grad_x, others[0], others[1]

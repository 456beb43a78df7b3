"""The op `ilm::glu`: act(gate) * up, the gated units of Llama (SwiGLU) and Gemma (GeGLU).

Variants of GLU (arXiv:2002.05202), by activation, each of the form act(z) = z s(z):

silu       s = sigmoid(z)
gelu       s = (1 + erf(z / sqrt(2))) / 2, the normal distribution
gelu_tanh  s = sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3), near it (arXiv:1606.08415)

It computes in float32 (float64 stays float64) and rounds once, to the dtype of the inputs. The
backward computes s again, so only gate and up are saved.

Shapes in this file: gate, up (..., N).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import differentiable, exact_dtype, implement

torch.library.define("ilm::glu", "(Tensor gate, Tensor up, str activation='silu') -> Tensor")
torch.library.define(
    "ilm::glu_backward",
    "(Tensor grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up, `activation` being one of ACTIVATIONS.

    gate, up: (..., N) of one shape and floating dtype, any strides: two halves of one projection
    need no copy. Returns a contiguous tensor like them. Differentiable once. Raises IlmCompileError
    where shapes or dtypes differ, or for another activation.
    """
    result: Tensor = torch.ops.ilm.glu(gate, up, activation)
    return result


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    alike = gate.shape == up.shape and gate.dtype == up.dtype
    if not alike or gate.dim() == 0 or not gate.dtype.is_floating_point:
        raise IlmCompileError(
            f"ilm::glu: expected gate and up (..., N) of one shape and one floating dtype; got "
            f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise IlmCompileError(
            f"ilm::glu: expected an activation of {list(ACTIVATIONS)}; got {activation!r}"
        )


def _share(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """s(z) and its derivative."""
    if activation == "gelu":
        return torch.special.ndtr(z), torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s, s * (1 - s)
    scale = math.sqrt(8 / math.pi)
    inner = scale * (z + 0.044715 * z**3)
    s = torch.sigmoid(inner)
    # 1 - s would have few digits left where the slope of `inner` is large
    return s, s * torch.sigmoid(-inner) * scale * (1 + 3 * 0.044715 * z**2)


def _forward(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    _check(gate, up, activation)
    exact = exact_dtype(gate)
    return (ACTIVATIONS[activation](gate.to(exact)) * up.to(exact)).to(gate.dtype).contiguous()


def _backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """d z s(z)/dz = s + z s'."""
    exact = exact_dtype(gate)
    z, dy = gate.to(exact), grad.to(exact)
    s, slope = _share(z, activation)
    grad_gate = dy * up.to(exact) * (s + z * slope)
    grad_up = dy * z * s
    return grad_gate.to(gate.dtype).contiguous(), grad_up.to(up.dtype).contiguous()


def _forward_fake(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    _check(gate, up, activation)
    return gate.new_empty(gate.shape)


def _backward_fake(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    grads = torch.ops.ilm.glu_backward(grad, *ctx.saved_tensors, ctx.activation)
    return *grads, None


implement("ilm::glu", _forward, "ilm_compile.kernels.triton_glu:glu")
implement("ilm::glu_backward", _backward, "ilm_compile.kernels.triton_glu:glu_backward")
torch.library.register_fake("ilm::glu", _forward_fake)
torch.library.register_fake("ilm::glu_backward", _backward_fake)
differentiable("ilm::glu", _save_inputs, _differentiate)

"""The op `ilm::swiglu`: silu(gate) * up, the gated activation of Llama and InternLM.

It computes in float32 (float64 stays float64) and rounds once, to the dtype of the inputs. The
backward computes the sigmoid again, so only gate and up are saved.

Shapes in this file: gate, up (..., N).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import differentiable, exact_dtype, implement

torch.library.define("ilm::swiglu", "(Tensor gate, Tensor up) -> Tensor")
torch.library.define(
    "ilm::swiglu_backward", "(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)"
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, where silu(z) = z * sigmoid(z).

    gate, up: (..., N) of one shape and floating dtype, any strides: two halves of one projection
    need no copy. Returns a contiguous tensor like them. Differentiable once. Raises IlmCompileError
    where shapes or dtypes differ.
    """
    result: Tensor = torch.ops.ilm.swiglu(gate, up)
    return result


def _check(gate: Tensor, up: Tensor) -> None:
    alike = gate.shape == up.shape and gate.dtype == up.dtype
    if not alike or gate.dim() == 0 or not gate.dtype.is_floating_point:
        raise IlmCompileError(
            f"ilm::swiglu: expected gate and up (..., N) of one shape and one floating dtype; got "
            f"gate {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}"
        )


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    exact = exact_dtype(gate)
    return (F.silu(gate.to(exact)) * up.to(exact)).to(gate.dtype).contiguous()


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """d silu(z)/dz = s + z s (1 - s) with s = sigmoid(z) (arXiv:1702.03118)."""
    exact = exact_dtype(gate)
    z, dy = gate.to(exact), grad.to(exact)
    s = torch.sigmoid(z)
    grad_gate = dy * up.to(exact) * (s + z * s * (1 - s))
    grad_up = dy * z * s
    return grad_gate.to(gate.dtype).contiguous(), grad_up.to(up.dtype).contiguous()


def _forward_fake(gate: Tensor, up: Tensor) -> Tensor:
    _check(gate, up)
    return gate.new_empty(gate.shape)


def _backward_fake(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = torch.ops.ilm.swiglu_backward(grad, *ctx.saved_tensors)
    return grad_gate, grad_up


implement("ilm::swiglu", _forward, "ilm_compile.kernels.triton_swiglu:swiglu")
implement("ilm::swiglu_backward", _backward, "ilm_compile.kernels.triton_swiglu:swiglu_backward")
torch.library.register_fake("ilm::swiglu", _forward_fake)
torch.library.register_fake("ilm::swiglu_backward", _backward_fake)
differentiable("ilm::swiglu", _save_inputs, _differentiate)

"""GLU in Triton, forward and backward: import it lazily.

Each program computes a piece of one row, in float32 from the moment it is loaded. Gate and up may
be halves of one projection: rows have any stride, and row numbers become int64 before they meet it.

Shapes in this file: gate, up (R, N) with any row stride.
"""

# Triton types neither its decorator nor what a kernel sees of its arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from ilm_compile.kernels.launch import Launch, device_of, flat_rows, launch_for, row_stride

# Eight elements of 16 bits a thread and load: 128 bits. Wider rows take several programs.
FORWARD = (
    Launch(block=256, rows=1, warps=1, programs_per_sm=32),
    Launch(block=1024, rows=1, warps=4, programs_per_sm=12),
)
BACKWARD = (
    Launch(block=256, rows=1, warps=1, programs_per_sm=32),
    Launch(block=1024, rows=1, warps=4, programs_per_sm=10),
)


@triton.jit
def _share(z, ACTIVATION: tl.constexpr):
    """s(z) and its derivative, of the activation z s(z): see glu.py for each."""
    if ACTIVATION == "gelu":
        s = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)  # sqrt(1 / 2)
        slope = 0.3989422804014327 * tl.exp(-0.5 * z * z)  # sqrt(1 / (2 pi))
    elif ACTIVATION == "gelu_tanh":
        scale: tl.constexpr = 1.5957691216057308  # sqrt(8 / pi)
        square = 0.044715 * z * z
        inner = scale * z * (1.0 + square)
        s = 1.0 / (1.0 + tl.exp(-inner))
        slope = s / (1.0 + tl.exp(inner)) * scale * (1.0 + 3.0 * square)
    else:
        s = 1.0 / (1.0 + tl.exp(-z))
        slope = s * (1.0 - s)
    return s, slope


@triton.jit
def _place(COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row, as int64, and its columns."""
    pieces: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    return row, program % pieces * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _load(base, row, stride, COLUMNS: tl.constexpr, column):
    """Elements as float32. A stride of None says that rows lie end to end."""
    start = row * COLUMNS if stride is None else row * stride
    return tl.load(base + start + column, mask=column < COLUMNS, other=0.0).to(tl.float32)


@triton.jit
def _store(base, row, COLUMNS: tl.constexpr, column, value):
    address = base + row * COLUMNS + column
    tl.store(address, value.to(base.dtype.element_ty), mask=column < COLUMNS)


@triton.jit
def _forward_kernel(
    gate,
    up,
    out,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = _place(COLUMNS, BLOCK)
    z = _load(gate, row, gate_stride, COLUMNS, column)
    value = _load(up, row, up_stride, COLUMNS, column)
    s, _ = _share(z, ACTIVATION)
    _store(out, row, COLUMNS, column, z * s * value)


@triton.jit
def _backward_kernel(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    grad_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = _place(COLUMNS, BLOCK)
    arriving = _load(grad, row, grad_stride, COLUMNS, column)
    z = _load(gate, row, gate_stride, COLUMNS, column)
    value = _load(up, row, up_stride, COLUMNS, column)
    s, slope = _share(z, ACTIVATION)
    _store(grad_gate, row, COLUMNS, column, arriving * value * (s + z * slope))
    _store(grad_up, row, COLUMNS, column, arriving * z * s)


def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`ilm::glu` of any strides. Returns a contiguous tensor like gate."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    flat_gate, flat_up = flat_rows(gate), flat_rows(up)
    num_rows, columns = flat_gate.shape
    launch = launch_for(FORWARD, min(columns, FORWARD[-1].block))
    with device_of(gate):
        _forward_kernel[(num_rows * triton.cdiv(columns, launch.block),)](
            flat_gate,
            flat_up,
            out,
            row_stride(flat_gate),
            row_stride(flat_up),
            ACTIVATION=activation,
            COLUMNS=columns,
            BLOCK=launch.block,
            num_warps=launch.warps,
            maxnreg=launch.max_registers,
        )
    return out


def glu_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`ilm::glu_backward`: gradients of gate and of up, contiguous."""
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grad_up = torch.empty_like(up, memory_format=torch.contiguous_format)
    if gate.numel() == 0:
        return grad_gate, grad_up
    flat_grad, flat_gate, flat_up = flat_rows(grad), flat_rows(gate), flat_rows(up)
    num_rows, columns = flat_gate.shape
    launch = launch_for(BACKWARD, min(columns, BACKWARD[-1].block))
    with device_of(gate):
        _backward_kernel[(num_rows * triton.cdiv(columns, launch.block),)](
            flat_grad,
            flat_gate,
            flat_up,
            grad_gate,
            grad_up,
            row_stride(flat_grad),
            row_stride(flat_gate),
            row_stride(flat_up),
            ACTIVATION=activation,
            COLUMNS=columns,
            BLOCK=launch.block,
            num_warps=launch.warps,
            maxnreg=launch.max_registers,
        )
    return grad_gate, grad_up

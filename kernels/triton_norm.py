"""RMSNorm and LayerNorm in Triton, with or without a residual sum: import it lazily.

Forward: a program per row (several rows where they are narrow), read once and written once.
Backward: a persistent grid. Each program walks over rows with a stride, holds its part of the
weight's gradient in float32 registers while the next row is on its way to shared memory, and
writes it once; the parts are then summed over programs. No atomics, so a run repeats bit for bit.
A row is one piece of columns, or several of equal size that are added up before the warps meet.

Shapes in this file: x (R, H) with any row stride, weight, bias (H,), partial (programs, H).
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from ilm_compile.kernels.launch import (
    Launch,
    device_of,
    flat_rows,
    launch_for,
    multiprocessors,
    row_stride,
)
from ilm_compile.kernels.triton_column_sums import column_sums
from ilm_compile.kernels.triton_norm_kernels import backward_kernel, forward_kernel

# 48 warps a multiprocessor. More than block / 512 a row narrow the loads of 16 bits below 128.
FORWARD = (
    Launch(block=64, rows=32, warps=4, programs_per_sm=10),
    Launch(block=128, rows=16, warps=4, programs_per_sm=10),
    Launch(block=256, rows=8, warps=4, programs_per_sm=10),
    Launch(block=512, rows=4, warps=4, programs_per_sm=10),
    Launch(block=1024, rows=2, warps=4, programs_per_sm=10),
    Launch(block=2048, rows=1, warps=4, programs_per_sm=12),
    Launch(block=4096, rows=1, warps=8, programs_per_sm=6),
    # Not of 4 warps, whose threads spill: 64 bits a load.
    Launch(block=1024, pieces=5, rows=1, warps=8, programs_per_sm=4),
    Launch(block=2048, pieces=3, rows=1, warps=8, programs_per_sm=4),
    Launch(block=8192, rows=1, warps=16, programs_per_sm=3),
    Launch(block=4096, pieces=3, rows=1, warps=16, programs_per_sm=2),
    Launch(block=16384, rows=1, warps=32, programs_per_sm=1),
)
# With a mean and a bias a thread needs 48 registers or more.
CENTERED_FORWARD = tuple(
    replace(launch, programs_per_sm=max(1, launch.programs_per_sm * 5 // 6)) for launch in FORWARD
)
# 32 KiB of 16-bit rows are on their way to each multiprocessor, which hides the memory's latency.
# A warp for 256 elements: with fewer, a thread that also keeps a float32 stream spills on sm_100.
BACKWARD = (
    Launch(block=64, rows=16, warps=4, programs_per_sm=6, stages=2),
    Launch(block=128, rows=8, warps=4, programs_per_sm=6, stages=2),
    Launch(block=256, rows=4, warps=4, programs_per_sm=5, stages=2),
    Launch(block=512, rows=2, warps=4, programs_per_sm=6, stages=2),
    Launch(block=1024, rows=2, warps=8, programs_per_sm=4, stages=2),
    Launch(block=2048, rows=1, warps=8, programs_per_sm=4, stages=2),
    Launch(block=4096, rows=1, warps=16, programs_per_sm=2, stages=2),
    Launch(block=1024, pieces=5, rows=1, warps=8, programs_per_sm=2, stages=2),
    Launch(block=2048, pieces=3, rows=1, warps=16, programs_per_sm=1, stages=3),
    Launch(block=8192, rows=1, warps=32, programs_per_sm=1, stages=2),
    # All that is kept from row to row is the weight's gradient.
    Launch(block=4096, pieces=3, rows=1, warps=32, programs_per_sm=1, twice=True),
    Launch(block=2048, pieces=8, rows=1, warps=32, programs_per_sm=1, twice=True),
)


@dataclass(frozen=True, slots=True)
class Norm:
    """Which norm: see rms_norm.py; `centered` takes the mean of a row away first (LayerNorm)."""

    eps: float
    cast_before_scale: bool = False
    weight_offset: float = 0.0
    centered: bool = False


def forward(
    norm: Norm,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The norm of x + residual in the dtype of x, and the sum in that of the residual.

    x of any strides; without a residual there is no sum. Both are contiguous.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = None
    if residual is not None:
        total = torch.empty_like(residual, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y, total
    flat = flat_rows(x)
    flat_residual = None if residual is None else flat_rows(residual)
    num_rows, hidden = flat.shape
    launch = launch_for(CENTERED_FORWARD if norm.centered else FORWARD, hidden)
    with device_of(x):
        forward_kernel[(triton.cdiv(num_rows, launch.rows),)](
            flat,
            flat_residual,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            y,
            total,
            num_rows,
            row_stride(flat),
            row_stride(flat_residual),
            HIDDEN=hidden,
            EPS=norm.eps,
            CAST=norm.cast_before_scale,
            OFFSET=norm.weight_offset,
            CENTER=norm.centered,
            # beside a mean or a stream of another dtype, its registers would be spilled
            EARLY=weight is not None
            and not norm.centered
            and (total is None or total.dtype == y.dtype),
            BLOCK=launch.block,
            PIECES=launch.pieces,
            ROWS=launch.rows,
            num_warps=launch.warps,
            maxnreg=launch.max_registers,
        )
    return y, total


def backward(
    norm: Norm,
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    has_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of x in the dtype of `grad` if that is another, of the weight and the bias.

    grad_sum: what comes to x beside the norm. One that is not there has no elements.
    """
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_x_low = None
    if grad.dtype != x.dtype:
        grad_x_low = torch.empty_like(grad, memory_format=torch.contiguous_format)
    flat, flat_grad = flat_rows(x), flat_rows(grad)
    flat_grad_sum = None if grad_sum is None else flat_rows(grad_sum)
    num_rows, hidden = flat.shape
    launch = launch_for(BACKWARD, hidden)
    tiles = triton.cdiv(num_rows, launch.rows)
    programs = min(tiles, multiprocessors(x) * launch.programs_per_sm)
    partial, partial_bias = (
        x.new_empty((programs, hidden), dtype=torch.float32) if wanted else None
        for wanted in (weight is not None, has_bias)
    )
    if programs > 0:
        with device_of(x):
            backward_kernel[(programs,)](
                flat_grad,
                flat,
                None if weight is None else weight.contiguous(),
                flat_grad_sum,
                grad_x,
                grad_x_low,
                partial,
                partial_bias,
                num_rows,
                row_stride(flat_grad),
                row_stride(flat),
                row_stride(flat_grad_sum),
                HIDDEN=hidden,
                EPS=norm.eps,
                CAST=norm.cast_before_scale,
                OFFSET=norm.weight_offset,
                CENTER=norm.centered,
                BLOCK=launch.block,
                PIECES=launch.pieces,
                ROWS=launch.rows,
                STAGES=launch.stages,
                TWICE=launch.twice,
                num_warps=launch.warps,
                maxnreg=launch.max_registers,
            )
    grad_weight, grad_bias = (
        x.new_empty(0) if weight is None or part is None else column_sums(part, weight.dtype)
        for part in (partial, partial_bias)
    )
    return grad_x, grad.new_empty(0) if grad_x_low is None else grad_x_low, grad_weight, grad_bias

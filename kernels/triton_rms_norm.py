"""RMSNorm in Triton, forward and backward, with or without a residual sum: import it lazily.

Forward: a program per row (several rows where they are narrow), read once and written once.
Backward: a persistent grid. Each program walks over rows with a stride, holds its part of the
weight's gradient in float32 registers while the next row is on its way to shared memory, and
writes it once; the parts are then summed over programs. No atomics, so a run repeats bit for bit.
A row is one piece of columns, or several of equal size that are added up before the warps meet.

Everything is computed in float32 from the moment it is loaded. What does not change from step to
step is a constexpr; the number of rows is not, nor is it specialised, so that no sequence length
compiles anew. Row numbers become int64 before they meet a stride.

Shapes in this file: x (R, H) with any row stride, weight (H,), partial (programs, H).
"""

# Triton types neither its decorator nor what a kernel sees of its arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
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
    Launch(block=4096, pieces=4, rows=1, warps=32, programs_per_sm=1, twice=True),
)


@triton.jit
def _load(base, row, stride, HIDDEN: tl.constexpr, column, mask, LAST: tl.constexpr = True):
    """Elements as float32. A stride of None says that rows lie end to end. LAST: never again."""
    # HIDDEN is known to the compiler, so that a multiple of 8 keeps loads of 128 bits.
    start = row.to(tl.int64) * HIDDEN if stride is None else row.to(tl.int64) * stride
    # with one policy for both, the compiler would keep what it loads twice, and spill it
    policy: tl.constexpr = "" if LAST else "evict_last"
    found = tl.load(base + start + column, mask=mask, other=0.0, eviction_policy=policy)
    return found.to(tl.float32)


@triton.jit
def _scale(weight, column, HIDDEN: tl.constexpr, OFFSET: tl.constexpr, LAST: tl.constexpr = True):
    """What the columns of a row are multiplied by."""
    policy: tl.constexpr = "" if LAST else "evict_last"
    scale = tl.load(weight + column, mask=column < HIDDEN, other=0.0, eviction_policy=policy)
    return scale.to(tl.float32) + OFFSET


@triton.jit
def _store(base, row, HIDDEN: tl.constexpr, column, mask, value):
    address = base + row.to(tl.int64) * HIDDEN + column
    tl.store(address, value.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x,
    residual,
    weight,
    y,
    total,
    num_rows,
    x_stride,
    residual_stride,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    CAST: tl.constexpr,
    OFFSET: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    first = tl.arange(0, BLOCK)[None, :]
    squares = 0.0
    pieces = ()
    scales = ()
    for i in tl.static_range(PIECES):
        column = i * BLOCK + first
        mask = (row < num_rows) & (column < HIDDEN)
        values = _load(x, row, x_stride, HIDDEN, column, mask)
        if residual is not None:
            values += _load(residual, row, residual_stride, HIDDEN, column, mask)
            _store(total, row, HIDDEN, column, mask, values)
            values = values.to(total.dtype.element_ty).to(tl.float32)
        if EARLY:  # the weight is on its way while the warps wait for their sum
            scales += (_scale(weight, column, HIDDEN, OFFSET),)
        squares = values * values if i == 0 else squares + values * values
        pieces += (values,)
    rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / HIDDEN + EPS)
    for i in tl.static_range(PIECES):
        column = i * BLOCK + first
        values = pieces[i] * rstd
        if weight is not None:
            if CAST:
                values = values.to(y.dtype.element_ty).to(tl.float32)
            if EARLY:
                values *= scales[i]
            else:
                values *= _scale(weight, column, HIDDEN, OFFSET)
        _store(y, row, HIDDEN, column, (row < num_rows) & (column < HIDDEN), values)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    grad,
    x,
    weight,
    grad_sum,
    grad_x,
    grad_x_low,
    partial,
    num_rows,
    grad_stride,
    x_stride,
    grad_sum_stride,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    CAST: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TWICE: tl.constexpr,
):
    HELD: tl.constexpr = PIECES if weight is not None else 0
    first = tl.arange(0, BLOCK)[None, :]
    scales = ()
    grad_weights = ()
    for i in tl.static_range(HELD):
        if not TWICE:
            scales += (_scale(weight, i * BLOCK + first, HIDDEN, OFFSET),)
        grad_weights += (tl.zeros((ROWS, BLOCK), tl.float32),)
    program, step = tl.program_id(0), tl.num_programs(0)
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), step, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        squares = 0.0
        products = 0.0
        rows = ()
        arriving = ()
        for i in tl.static_range(PIECES):
            column = i * BLOCK + first
            mask = (row < num_rows) & (column < HIDDEN)
            values = _load(x, row, x_stride, HIDDEN, column, mask, not TWICE)
            scaled = _load(grad, row, grad_stride, HIDDEN, column, mask, not TWICE)
            if not TWICE:
                rows += (values,)
                arriving += (scaled,)
            if weight is not None:
                if TWICE:
                    scaled *= _scale(weight, column, HIDDEN, OFFSET, False)
                else:
                    scaled *= scales[i]
            squares = values * values if i == 0 else squares + values * values
            products = scaled * values if i == 0 else products + scaled * values
        if grad_x_low is None:  # one reduction: the warps meet for both sums at once
            both = tl.sum(tl.join(squares, products), axis=1, keep_dims=True)
            square, product = tl.split(both)
        else:  # no registers are left for that beside a float32 stream
            square = tl.sum(squares, axis=1, keep_dims=True)
            product = tl.sum(products, axis=1, keep_dims=True)
        rstd = tl.rsqrt(square / HIDDEN + EPS)
        more = ()
        for i in tl.static_range(PIECES):
            column = i * BLOCK + first
            mask = (row < num_rows) & (column < HIDDEN)
            if TWICE:
                unit = _load(x, row, x_stride, HIDDEN, column, mask) * rstd
                scaled = _load(grad, row, grad_stride, HIDDEN, column, mask)
            else:
                unit = rows[i] * rstd
                scaled = arriving[i]
            if weight is not None:
                seen = unit
                if CAST:
                    seen = unit.to(grad.dtype.element_ty).to(tl.float32)
                more += (grad_weights[i] + scaled * seen,)
                if TWICE:
                    scaled *= _scale(weight, column, HIDDEN, OFFSET)
                else:
                    scaled *= scales[i]
            result = rstd * (scaled - unit * (rstd * product / HIDDEN))
            if grad_sum is not None:
                result += _load(grad_sum, row, grad_sum_stride, HIDDEN, column, mask)
            _store(grad_x, row, HIDDEN, column, mask, result)
            if grad_x_low is not None:
                _store(grad_x_low, row, HIDDEN, column, mask, result)
        grad_weights = more
    for i in tl.static_range(HELD):
        column = i * BLOCK + first
        found = tl.sum(grad_weights[i], axis=0, keep_dims=True)
        tl.store(partial + program.to(tl.int64) * HIDDEN + column, found, mask=column < HIDDEN)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool = False,
    weight_offset: float = 0.0,
) -> Tensor:
    """`ilm::rms_norm` of any strides. Returns a contiguous tensor like x."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _forward(x, None, weight, y, None, eps, cast_before_scale, weight_offset)
    return y


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool = False,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`ilm::add_rms_norm`: the norm in the dtype of x, the sum in that of the residual."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(residual, memory_format=torch.contiguous_format)
    _forward(x, residual, weight, y, total, eps, cast_before_scale, weight_offset)
    return y, total


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
) -> None:
    if x.numel() == 0:
        return
    flat = flat_rows(x)
    flat_residual = None if residual is None else flat_rows(residual)
    num_rows, hidden = flat.shape
    launch = launch_for(FORWARD, hidden)
    with device_of(x):
        _forward_kernel[(triton.cdiv(num_rows, launch.rows),)](
            flat,
            flat_residual,
            None if weight is None else weight.contiguous(),
            y,
            total,
            num_rows,
            row_stride(flat),
            row_stride(flat_residual),
            HIDDEN=hidden,
            EPS=eps,
            CAST=cast_before_scale,
            OFFSET=weight_offset,
            # beside a stream of another dtype, its registers would be spilled
            EARLY=weight is not None and (total is None or total.dtype == y.dtype),
            BLOCK=launch.block,
            PIECES=launch.pieces,
            ROWS=launch.rows,
            num_warps=launch.warps,
            maxnreg=launch.max_registers,
        )


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    """`ilm::rms_norm_backward`: gradients of x, contiguous, and of the weight."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    options = (eps, cast_before_scale, weight_offset)
    return grad_x, _backward(grad, None, x, weight, grad_x, None, *options)


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
    grad_residual = torch.empty_like(total, memory_format=torch.contiguous_format)
    same = grad.dtype == total.dtype
    grad_x = None if same else torch.empty_like(grad, memory_format=torch.contiguous_format)
    options = (eps, cast_before_scale, weight_offset)
    grad_weight = _backward(grad, grad_sum, total, weight, grad_residual, grad_x, *options)
    return grad_residual, grad.new_empty(0) if grad_x is None else grad_x, grad_weight


def _backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    grad_x: Tensor,
    grad_x_low: Tensor | None,
    eps: float,
    cast_before_scale: bool,
    weight_offset: float,
) -> Tensor:
    """Fill the gradients of x and return that of the weight."""
    flat, flat_grad = flat_rows(x), flat_rows(grad)
    flat_grad_sum = None if grad_sum is None else flat_rows(grad_sum)
    num_rows, hidden = flat.shape
    launch = launch_for(BACKWARD, hidden)
    tiles = triton.cdiv(num_rows, launch.rows)
    programs = min(tiles, multiprocessors(x) * launch.programs_per_sm)
    partial = None
    if weight is not None:
        partial = x.new_empty((programs, hidden), dtype=torch.float32)
    if programs > 0:
        with device_of(x):
            _backward_kernel[(programs,)](
                flat_grad,
                flat,
                None if weight is None else weight.contiguous(),
                flat_grad_sum,
                grad_x,
                grad_x_low,
                partial,
                num_rows,
                row_stride(flat_grad),
                row_stride(flat),
                row_stride(flat_grad_sum),
                HIDDEN=hidden,
                EPS=eps,
                CAST=cast_before_scale,
                OFFSET=weight_offset,
                BLOCK=launch.block,
                PIECES=launch.pieces,
                ROWS=launch.rows,
                STAGES=launch.stages,
                TWICE=launch.twice,
                num_warps=launch.warps,
                maxnreg=launch.max_registers,
            )
    if weight is None or partial is None:
        return x.new_empty(0)
    return column_sums(partial, weight.dtype)

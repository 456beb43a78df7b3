"""What the programs of a persistent grid have added up, summed over programs: import it lazily.

One launch that reads, adds and rounds, where `sum(0).to(dtype)` is two, and a fill of semaphores
besides where torch splits a sum over blocks. A program for 32 columns, a line of memory of each
row: 128 programs at 4096 columns. The order of a sum is fixed, so a run repeats bit for bit.
"""

# Triton types neither its decorator nor what a kernel sees of its arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from ilm_compile.kernels.launch import device_of

COLUMNS, ROWS, WARPS = 32, 128, 8


@triton.jit(do_not_specialize=["num_rows"])
def _sum_kernel(
    rows, out, num_rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, num_rows, ROWS):
        mask = (first + row < num_rows) & (column < WIDTH)
        total += tl.load(rows + (first + row) * WIDTH + column, mask=mask, other=0.0)
    found = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out + column, found.to(out.dtype.element_ty), mask=column < WIDTH)


def column_sums(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum (N,) of rows (R, N), contiguous float32, below 2^31 numbers, rounded to `dtype`."""
    num_rows, width = rows.shape
    out = rows.new_empty(width, dtype=dtype)
    with device_of(rows):
        _sum_kernel[(triton.cdiv(width, COLUMNS),)](
            rows, out, num_rows, WIDTH=width, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=WARPS
        )
    return out

"""How the Triton kernels are launched: tables by width instead of autotuning.

A table is readable, the same on every machine, and needs no GPU to be checked: the tests compile
every row ahead of time and hold that it does not spill and fits the multiprocessor it claims.
"""

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# What a CPU tensor counts as, where a launcher runs under Triton's interpreter.
INTERPRETED_MULTIPROCESSORS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How one kernel runs at widths up to `width`.

    block: columns that a program has of a row at a time, a power of two; pieces: how many times,
    so that 3 x 2048 columns leave no lanes idle. rows: rows it has at a time.
    warps: of 32 threads. programs_per_sm: programs that a multiprocessor holds at once; a
    persistent grid has that many for each. stages: rows in flight in a pipelined loop, the one in
    use included. twice: a row is read once for its sums and once more, from the cache, for what
    depends on them: it is too wide to be kept in registers.
    """

    block: int
    pieces: int = 1
    rows: int
    warps: int
    programs_per_sm: int
    stages: int = 1
    twice: bool = False

    @property
    def width(self) -> int:
        """Columns that it is wide enough for."""
        return self.block * self.pieces

    @property
    def max_registers(self) -> int:
        """Registers a thread may use if `programs_per_sm` programs are to be resident together.

        A multiprocessor of sm_80 to sm_100 has 65536, given out to a warp in eights a thread.
        Left to itself ptxas aims at another occupancy, and was seen to spill for it.
        """
        share = 65536 // (32 * self.warps * self.programs_per_sm)
        return min(255, share // 8 * 8)


def launch_for(table: Sequence[Launch], width: int) -> Launch:
    """The first row of the table that is wide enough. `width` must not pass the last one."""
    return table[bisect_left(table, width, key=lambda launch: launch.width)]


def flat_rows(x: Tensor) -> Tensor:
    """x (..., N) as (rows, N) with stride 1 inside a row: a view where strides allow, else a copy.

    Kernels take the stride of a row, so slices of a fused projection and rows expanded from one
    need no copy; transposed tensors and gradients expanded from a scalar do.
    """
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def row_stride(flat: Tensor | None) -> int | None:
    """Elements from one row of (rows, N) to the next; None where rows lie end to end, or no tensor.

    A kernel that gets None uses its constant N: a compiler that knows the stride loads wider.
    """
    if flat is None or flat.stride(0) == flat.shape[1]:
        return None
    return flat.stride(0)


def multiprocessors(x: Tensor) -> int:
    """How many multiprocessors the device of x has."""
    return _multiprocessors(x.device) if x.is_cuda else INTERPRETED_MULTIPROCESSORS


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def device_of(x: Tensor) -> AbstractContextManager[object]:
    """The context in which a kernel on x is launched: Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

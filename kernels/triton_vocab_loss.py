"""The sharded cross entropy's local ops in Triton, each one pass over the logits. Import it lazily.

The number of tokens and this rank's first class are neither constexprs nor specialised: no sequence
length and no rank compiles anew. Row numbers become int64 before they meet a stride.

Shapes in this file: logits (N, V) with any row stride, target and the numbers of a token (N,).
"""

# Triton types neither its decorator nor what a kernel sees of its arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl
from torch import Tensor

from ilm_compile.kernels.launch import device_of, flat_rows

# 16 numbers a thread: two 128-bit loads at 16 bits. Statistics keep three registers for each.
BLOCK = 2048
MIN_BLOCK = 128
ELEMENTS_PER_WARP = 512
LOWEST = tl.constexpr(-3.0e38)  # stands for minus infinity, of which differences are NaN


def block_for(num_classes: int) -> tuple[int, int]:
    """Classes that a program holds at a time, and its warps."""
    block = min(max(triton.next_power_of_2(num_classes), MIN_BLOCK), BLOCK)
    return block, max(block // ELEMENTS_PER_WARP, 1)


@triton.jit(do_not_specialize=["first", "ignore_index", "vocab"])
def statistics_kernel(
    logits,
    target,
    top_out,
    sum_exp_out,
    picked_out,
    total_out,
    row_stride,
    first,
    ignore_index,
    vocab,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token. Each lane keeps the largest logit it has met and the sum of exp(logit - largest),
    with one exponential a logit (online softmax, arXiv:1805.02867); lanes are joined at the end."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * row_stride
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    sum_exp = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CLASSES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < CLASSES
        x = tl.load(base + column, mask=inside, other=float("-inf")).to(tl.float32)
        total += tl.where(inside, x, 0.0)
        ratio = tl.exp(-tl.abs(x - top))
        above = x > top
        sum_exp = tl.where(above, sum_exp * ratio + 1.0, sum_exp + ratio)
        top = tl.where(above, x, top)
    largest = tl.max(top, axis=0)
    joined = tl.sum(sum_exp * tl.exp(top - largest), axis=0)
    wanted = tl.load(target + row).to(tl.int64)
    counted = wanted != ignore_index
    local = wanted - first
    here = counted & (local >= 0) & (local < CLASSES)
    picked = tl.load(base + local, mask=here, other=0.0).to(tl.float32)
    known = (wanted >= 0) & (wanted < vocab)
    joined = tl.where(counted & (known == 0), float("nan"), joined)
    largest = tl.where(largest <= LOWEST, float("-inf"), largest)
    tl.store(top_out + row, largest)
    tl.store(sum_exp_out + row, joined)
    tl.store(picked_out + row, picked)
    tl.store(total_out + row, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["first", "ignore_index"])
def backward_kernel(
    logits,
    target,
    logsumexp,
    grad,
    grad_logits,
    row_stride,
    first,
    ignore_index,
    HIT: tl.constexpr,
    UNIFORM: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A piece of one token. Logits of ignored tokens are not even read."""
    pieces: tl.constexpr = (CLASSES + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    column = program % pieces * BLOCK + tl.arange(0, BLOCK)
    inside = column < CLASSES
    wanted = tl.load(target + row).to(tl.int64)
    counted = wanted != ignore_index
    x = tl.load(logits + row * row_stride + column, mask=inside & counted, other=0.0)
    result = tl.exp(x.to(tl.float32) - tl.load(logsumexp + row)) - UNIFORM
    result = tl.where(column == wanted - first, result - HIT, result)
    result = tl.where(counted, result * tl.load(grad + row), 0.0)
    place = grad_logits + row * CLASSES + column
    tl.store(place, result.to(grad_logits.dtype.element_ty), mask=inside)


def vocab_statistics(
    logits: Tensor, target: Tensor, first: int, ignore_index: int, vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ilm::vocab_statistics`, float32. A target outside the vocabulary makes NaN."""
    num_tokens, num_classes = logits.shape
    outs = [logits.new_empty(num_tokens, dtype=torch.float32) for _ in range(4)]
    logits = flat_rows(logits)
    block, warps = block_for(num_classes)
    if num_tokens > 0:
        with device_of(logits):
            statistics_kernel[(num_tokens,)](
                *(logits, target.contiguous(), *outs, logits.stride(0)),
                *(first, ignore_index, vocab),
                CLASSES=num_classes,
                BLOCK=block,
                num_warps=warps,
            )
    top, sum_exp, picked, total = outs
    return top, sum_exp, picked, total


def vocab_cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    logsumexp: Tensor,
    grad: Tensor,
    first: int,
    ignore_index: int,
    label_smoothing: float,
    vocab: int,
) -> Tensor:
    """`ilm::vocab_cross_entropy_backward`: contiguous, in the dtype of the logits."""
    num_tokens, num_classes = logits.shape
    result = torch.empty_like(logits, memory_format=torch.contiguous_format)
    logits = flat_rows(logits)
    block, warps = block_for(num_classes)
    if result.numel() > 0:
        with device_of(logits):
            backward_kernel[(num_tokens * triton.cdiv(num_classes, block),)](
                *(logits, target.contiguous(), logsumexp.contiguous(), grad.float().contiguous()),
                *(result, logits.stride(0), first, ignore_index),
                HIT=1.0 - label_smoothing,
                UNIFORM=label_smoothing / vocab,
                CLASSES=num_classes,
                BLOCK=block,
                num_warps=warps,
            )
    return result

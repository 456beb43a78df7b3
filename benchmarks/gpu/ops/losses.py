"""The local ops of a cross entropy over a sharded vocabulary: this rank has the second half of it.

Shapes in this file: logits (R, N), numbers of a token (R,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.ops.op import KernelOp, Maker, Tensors
from ilm_compile import kernels

IGNORED = -100
SMOOTHING = 0.1
NUM_CLASSES = (100, 768, 4096, 16384, 92544)
MAX_ROWS = 4099


def _logits(make: Maker, rows: int, width: int) -> Tensors:
    target = make.integers(2 * width, rows)
    target[1::5] = IGNORED
    target[0] = target[-1] = width  # of this half
    logits = make.normal(rows, width) + 1  # a sum near 0 has a large relative error
    return {"logits": logits, "target": target}


def vocab_statistics() -> KernelOp:
    def fused(t: Tensors) -> tuple[Tensor, ...]:
        width = t["logits"].shape[1]
        return kernels.vocab_statistics(t["logits"], t["target"], width, IGNORED, 2 * width)

    def plain(t: Tensors) -> tuple[Tensor, ...]:
        x = t["logits"].float()
        top = x.amax(-1)
        column, here = _column(t)
        picked = torch.where(here, x.gather(-1, column).squeeze(-1), 0.0)
        return top, (x - top.unsqueeze(-1)).exp().sum(-1), picked, x.sum(-1)

    return KernelOp(
        inputs=_logits,
        fused=fused,
        plain=plain,
        outputs=("max", "sum_exp", "picked", "sum"),
        widths=NUM_CLASSES,
        max_rows=MAX_ROWS,
        in_float32=True,
    )


def vocab_cross_entropy_backward() -> KernelOp:
    def inputs(make: Maker, rows: int, width: int) -> Tensors:
        t = _logits(make, rows, width)
        logsumexp = t["logits"].float().logsumexp(-1) + 0.7  # the other half has about as much
        return t | {"logsumexp": logsumexp, "grad": make.normal(rows, dtype=torch.float32)}

    def fused(t: Tensors) -> tuple[Tensor, ...]:
        width = t["logits"].shape[1]
        tensors = (t["logits"], t["target"], t["logsumexp"], t["grad"])
        options = (width, IGNORED, SMOOTHING, 2 * width)
        return (kernels.vocab_cross_entropy_backward(*tensors, *options),)

    def plain(t: Tensors) -> tuple[Tensor, ...]:
        x = t["logits"].float()
        column, here = _column(t)
        share = (x - t["logsumexp"].unsqueeze(-1)).exp() - SMOOTHING / (2 * x.shape[1])
        share = share.scatter_add(-1, column, here.float().unsqueeze(-1) * (SMOOTHING - 1))
        grad = torch.where(t["target"] == IGNORED, 0.0, t["grad"])
        return ((share * grad.unsqueeze(-1)).to(t["logits"].dtype),)

    return KernelOp(
        inputs=inputs,
        fused=fused,
        plain=plain,
        outputs=("grad of logits",),
        widths=NUM_CLASSES,
        max_rows=MAX_ROWS,
    )


def _column(t: Tensors) -> tuple[Tensor, Tensor]:
    """The column (R, 1) of each target, 0 where it is not here, and whether it is, (R,)."""
    width = t["logits"].shape[1]
    column = t["target"] - width
    here = (column >= 0) & (column < width)
    return torch.where(here, column, 0).unsqueeze(-1), here

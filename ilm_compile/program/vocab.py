"""Vocabulary-parallel ends of a language model: embedding and cross entropy.

Both keep the vocabulary dimension sharded throughout: the embedding leaves a partial sum, and the
cross entropy reduces three numbers per token instead of gathering the logits. The offset of this
rank's rows is read at run time, so that all ranks share one graph. The method is Megatron-LM's
(arXiv:1909.08053, section 3); `megatron/core/tensor_parallel/cross_entropy.py` is its reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ilm_compile.program.communicator import communicator

MEAN, SUM = 1, 2  # ATen's encoding of cross_entropy_loss(reduction=...)


def vocab_embedding(weight: Tensor, indices: Tensor, padding_idx: int, axis: str) -> Tensor:
    """Return this rank's part of an embedding lookup: rows it does not hold are zero.

    weight: (vocab / size, hidden); indices: any shape, the same on all ranks; the result,
    (*indices.shape, hidden), has placement P.
    """
    first = communicator(axis).rank * weight.shape[0]
    local = indices - first
    absent = (local < 0) | (local >= weight.shape[0])
    local_padding = padding_idx - first if 0 <= padding_idx - first < weight.shape[0] else None
    rows = F.embedding(local.masked_fill(absent, 0), weight, padding_idx=local_padding)
    return rows.masked_fill(absent.unsqueeze(-1), 0.0)


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, axis: str, ignore_index: int, smoothing: float
    ) -> Tensor:
        comm = communicator(axis)
        width = logits.shape[-1]
        vocab = width * comm.size
        shifted = logits - comm.all_reduce(logits.amax(-1), op="max").unsqueeze(-1)
        local = target - comm.rank * width
        counted = target != ignore_index
        here = (local >= 0) & (local < width) & counted
        column = local.masked_fill(~here, 0).unsqueeze(-1)
        picked = shifted.gather(-1, column).squeeze(-1).masked_fill(~here, 0.0)
        softmax = shifted.exp()
        sums = [softmax.sum(-1), picked] + ([shifted.sum(-1)] if smoothing else [])
        total, picked, *rest = comm.all_reduce(torch.stack(sums)).unbind(0)
        loss = total.log() - picked
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (total.log() - rest[0] / vocab)
        softmax /= total.unsqueeze(-1)
        ctx.save_for_backward(softmax, column, here, counted)
        ctx.smoothing, ctx.vocab = smoothing, vocab
        return loss.masked_fill(~counted, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        softmax, column, here, counted = ctx.saved_tensors
        onehot = here.to(softmax.dtype).unsqueeze(-1) * (1 - ctx.smoothing)
        result = softmax.scatter_add(-1, column, -onehot)
        if ctx.smoothing:
            result -= ctx.smoothing / ctx.vocab
        counted_grad = grad.masked_fill(~counted, 0.0)  # no product: 0 * nan, of no targets, is nan
        return result.mul_(counted_grad.unsqueeze(-1)), None, None, None, None


def vocab_cross_entropy(
    logits: Tensor,
    target: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    axis: str,
) -> Tensor:
    """Return the cross entropy of logits whose vocabulary is sharded; the logits are not gathered.

    logits: (tokens, vocab / size); target: (tokens,), the same on all ranks. `reduction` is ATen's:
    1 mean over the targets that are not `ignore_index`, 2 sum. The scalar result has placement I.
    """
    losses: Tensor = _VocabCrossEntropy.apply(logits, target, axis, ignore_index, label_smoothing)  # type: ignore[no-untyped-call]
    total = losses.sum()
    return total / (target != ignore_index).sum() if reduction == MEAN else total

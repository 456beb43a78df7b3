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
from torch import Tensor, fx

from ilm_compile.kernels.library import exact_dtype
from ilm_compile.kernels.vocab_loss import vocab_cross_entropy_backward, vocab_statistics
from ilm_compile.program.communicator import Communicator, communicator
from ilm_compile.program.functions import graph_function
from ilm_compile.program.reductions import MEAN, NONE


@graph_function()
def vocab_embedding(weight: Tensor, indices: Tensor, padding_idx: int, axis: str) -> Tensor:
    """Return this rank's part of an embedding lookup: rows it does not hold are zero.

    weight: (vocab / size, hidden); indices: any shape, the same on all ranks; the result,
    (*indices.shape, hidden), has placement P.
    """
    local, absent, padding = local_rows(indices, weight.shape[0], padding_idx, axis)
    rows = F.embedding(local, weight, padding_idx=padding if padding >= 0 else None)
    return rows.masked_fill(absent.unsqueeze(-1), 0.0)


def local_rows(
    indices: Tensor, rows: int, padding_idx: int, axis: str
) -> tuple[Tensor, Tensor, int]:
    """Return where `indices` lie in the `rows` of this rank, which do not, and the padding's row.

    Row 0 stands for those that do not lie here, -1 for a padding row that does not.
    """
    first = communicator(axis).rank * rows
    local = indices - first
    absent = (local < 0) | (local >= rows)
    padding = padding_idx - first
    return local.masked_fill(absent, 0), absent, padding if 0 <= padding < rows else -1


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, axis: str, ignore_index: int, smoothing: float
    ) -> Tensor:
        comm = communicator(axis)
        width = logits.shape[-1]
        vocab, first = width * comm.size, width * comm.rank
        found = vocab_statistics(logits, target, first, ignore_index, vocab)
        losses, logsumexp = token_losses(found, target, comm, width, ignore_index, smoothing)
        ctx.save_for_backward(logits, target, logsumexp)
        ctx.options = (first, ignore_index, smoothing, vocab)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, target, logsumexp = ctx.saved_tensors
        grads = vocab_cross_entropy_backward(logits, target, logsumexp, grad, *ctx.options)
        return grads, None, None, None, None


def _reduced(node: fx.Node) -> tuple[list[int], ...]:
    logits = node.args[0].meta["val"]  # type: ignore[union-attr]
    tokens = logits.numel() // logits.shape[1]
    row = tokens * exact_dtype(logits).itemsize  # reduced in float32, or float64
    stacked = 3 if node.args[4] else 2  # label smoothing reduces a third number per token
    return ([row, stacked * row],)


@graph_function(_reduced)
def vocab_cross_entropy(
    logits: Tensor,
    target: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    axis: str,
) -> Tensor:
    """Return the cross entropy of logits whose vocabulary is sharded; the logits are not gathered.

    logits: (tokens, vocab / size, ...); target: (tokens, ...), the same on all ranks. `reduction`
    is ATen's: 0 none, 1 mean over the targets that are not `ignore_index`, 2 sum. The result has
    placement I and is float32, or float64 for float64 logits, as is everything before it. The
    backward pass keeps the logits and one logsumexp a token, no softmax. A target outside the
    vocabulary raises IlmCompileError on the CPU and makes the loss NaN on CUDA.
    """
    flat = logits.movedim(1, -1).flatten(0, -2), target.flatten()
    losses: Tensor = _VocabCrossEntropy.apply(*flat, axis, ignore_index, label_smoothing)  # type: ignore[no-untyped-call]
    return mean_or_sum(losses, target, reduction, ignore_index)


def token_losses(
    statistics: tuple[Tensor, ...],
    target: Tensor,
    comm: Communicator | None,
    width: int,
    ignore_index: int,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the logsumexp of each token from what `vocab_statistics` found.

    comm: the ranks that hold `width` classes each; None where one holds all.
    """
    top, exps, picked, total = statistics
    first = width * comm.rank if comm else 0
    vocab = width * comm.size if comm else width
    top_here, top = top, comm.all_reduce(top, op="max") if comm else top
    here = (target >= first) & (target < first + width)
    sums = [exps * (top_here - top).exp(), (picked - top).masked_fill(~here, 0.0)]
    sums += [total - width * top] if smoothing else []
    stacked = torch.stack(sums)
    exps, picked, *rest = (comm.all_reduce(stacked) if comm else stacked).unbind(0)
    log_exps = exps.log()
    loss = log_exps - picked
    if smoothing:
        loss = (1 - smoothing) * loss + smoothing * (log_exps - rest[0] / vocab)
    return loss.masked_fill(target == ignore_index, 0.0), top + log_exps


def mean_or_sum(losses: Tensor, target: Tensor, reduction: int, ignore_index: int) -> Tensor:
    """Return what ATen's `reduction` makes of the loss of each token."""
    if reduction == NONE:
        return losses.view(target.shape)
    total = losses.sum()
    return total / (target != ignore_index).sum() if reduction == MEAN else total

"""The head of a language model and its cross entropy in one: logits of some tokens at a time.

Of the forward only the hidden states, the weight and one logsumexp a token are kept. The backward
makes the logits of a chunk once more, their gradient in place of them, and from it the gradients of
hidden states and weight; that of the weight is added up in full precision. It costs a third more
products of the head, and saves the largest value of most models.

Shapes in this file: x (N tokens, hidden), weight (V classes that this rank holds, hidden), target
(N,).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ilm_compile.kernels.library import exact_dtype
from ilm_compile.kernels.vocab_loss import vocab_cross_entropy_backward, vocab_statistics
from ilm_compile.program.communicator import communicator
from ilm_compile.program.functions import graph_function
from ilm_compile.program.vocab import mean_or_sum, token_losses

# Logits at a time: 256 MiB in 16 bits, more than a thousand tokens of the largest vocabularies.
CHUNK = 2**27


def _reduced(node: fx.Node) -> tuple[list[int], ...]:
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    row = x.shape[0] * exact_dtype(x).itemsize
    return ([row, (3 if node.args[5] else 2) * row],)


@graph_function(_reduced)
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    axis: str,
) -> Tensor:
    """Return the cross entropy of the logits ``x @ weight.t()``, which are computed in x's dtype.

    axis: over which the vocabulary is sharded, "" where it is whole. Otherwise, and for the other
    arguments, as `ilm_compile.program.vocab.vocab_cross_entropy`. A weight of a wider dtype is cast
    while it is used, and its gradient is not rounded.
    """
    losses: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x, weight, target, axis, ignore_index, label_smoothing
    )
    return mean_or_sum(losses, target, reduction, ignore_index)


@graph_function()
def output_logits(x: Tensor, weight: Tensor, is_kept: bool) -> Tensor:
    """Return the logits ``x @ weight.t()``, without gradient, for who asked for the model's output.

    is_kept: False where nobody did; the value has their shape then, and the memory of one number.
    """
    with torch.no_grad():
        if is_kept:
            return F.linear(x, weight.to(x.dtype))
        return x.new_zeros(()).expand(*x.shape[:-1], weight.shape[0])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        target: Tensor,
        axis: str,
        ignore_index: int,
        smoothing: float,
    ) -> Tensor:
        comm = communicator(axis) if axis else None
        width = weight.shape[0]
        first = width * comm.rank if comm else 0
        vocab = width * comm.size if comm else width
        low = weight.to(x.dtype)
        parts = [
            vocab_statistics(F.linear(x[rows], low), target[rows], first, ignore_index, vocab)
            for rows in _chunks(x, width)
        ]
        top, exps, picked, total = map(torch.cat, zip(*parts, strict=True))
        losses, logsumexp = token_losses(
            (top, exps, picked, total), target, comm, width, ignore_index, smoothing
        )
        ctx.save_for_backward(x, weight, target, logsumexp)
        ctx.options = (first, ignore_index, smoothing, vocab)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, target, logsumexp = ctx.saved_tensors
        low = weight.to(x.dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=exact_dtype(weight))
        for rows in _chunks(x, weight.shape[0]):
            of_logits = vocab_cross_entropy_backward(
                F.linear(x[rows], low), target[rows], logsumexp[rows], grad[rows], *ctx.options
            )
            if grad_x is not None:
                grad_x[rows] = of_logits @ low
            if grad_weight is not None:
                grad_weight += of_logits.t() @ x[rows]
        return grad_x, grad_weight, None, None, None, None


def _chunks(x: Tensor, width: int) -> Iterator[slice]:
    rows = max(CHUNK // max(width, 1), 1)
    return (slice(start, start + rows) for start in range(0, max(x.shape[0], 1), rows))

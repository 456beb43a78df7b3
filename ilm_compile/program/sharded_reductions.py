"""Reductions over a dimension that is sharded, and what softmaxes make of them.

Instead of gathering the dimension, one or two numbers per kept element are reduced over the ranks:
its maximum, and the sum of its exponentials. Every rank sees the same result, so a reduction is
placed I; a softmax stays sharded as it was. Numbers are reduced in float32, or float64 for float64.
"""

from __future__ import annotations

from math import inf, nan, prod
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.library import exact_dtype
from ilm_compile.program.communicator import Communicator, communicator
from ilm_compile.program.functions import graph_function
from ilm_compile.program.reductions import MEAN, NONE
from ilm_compile.program.values import tensors_of


def _exponentials(x: Tensor, dims: list[int], comm: Communicator) -> tuple[Tensor, Tensor, Tensor]:
    """Return (exp(x - top), top, the sum of the first over all ranks), the last two kept in rank.

    `top` is the largest over all ranks, 0 where that is infinite: as `torch.logsumexp`.
    """
    exact = x.to(exact_dtype(x))
    top = comm.all_reduce(exact.amax(dims, keepdim=True), op="max")
    top = top.masked_fill(top.abs() == inf, 0.0)
    exps = (exact - top).exp()
    return exps, top, comm.all_reduce(exps.sum(dims, keepdim=True))


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: list[int], comm: Communicator) -> Tensor:
        _, top, total = _exponentials(x, dims, comm)
        result = total.log() + top
        ctx.save_for_backward(x, result)
        return result.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, result = ctx.saved_tensors
        return ((x - result).exp() * grad).to(x.dtype), None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, comm: Communicator, is_log: bool) -> Tensor:
        exps, top, total = _exponentials(x, [dim], comm)
        result = (x - (total.log() + top) if is_log else exps / total).to(x.dtype)
        ctx.save_for_backward(result)
        ctx.over = dim, comm, is_log
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (result,) = ctx.saved_tensors
        dim, comm, is_log = ctx.over
        exact = grad.to(exact_dtype(grad))
        total = comm.all_reduce((exact if is_log else exact * result).sum(dim, keepdim=True))
        found = exact - result.exp() * total if is_log else (exact - total) * result
        return found.to(grad.dtype), None, None, None


class _Amax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: list[int], comm: Communicator) -> Tensor:
        result = comm.all_reduce(x.amax(dims, keepdim=True), op="max")
        ctx.save_for_backward(x, result)
        ctx.over = dims, comm
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, result = ctx.saved_tensors
        dims, comm = ctx.over
        equal = (x == result).to(exact_dtype(x))  # equal ones share the gradient, as in torch
        count = comm.all_reduce(equal.sum(dims, keepdim=True))
        return (equal / count * grad).to(x.dtype), None, None


def _squeezed(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    return x if keepdim else x.squeeze(dims)


def _kept(node: fx.Node) -> tuple[int, int]:
    """Return how many numbers a reduction keeps, and the bytes of one in full precision."""
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    dims = [node.args[1]] if isinstance(node.args[1], int) else node.args[1]
    reduced = prod(x.shape[dim] for dim in dims)  # type: ignore[union-attr]
    return x.numel() // reduced, exact_dtype(tensors_of(node.meta["val"])[0]).itemsize


def _exponential_sums(node: fx.Node) -> tuple[list[int], ...]:
    count, itemsize = _kept(node)
    return ([count * itemsize, count * itemsize],)


def _softmax(node: fx.Node) -> tuple[list[int], ...]:
    count, itemsize = _kept(node)
    return *_exponential_sums(node), [count * itemsize]


def _extreme(node: fx.Node) -> tuple[list[int], ...]:
    count, itemsize = _kept(node)
    return [count * node.meta["val"].element_size()], [count * itemsize]  # how many were equal


def _place(node: fx.Node) -> tuple[list[int], ...]:
    x = node.args[0].meta["val"]  # type: ignore[union-attr]
    count, _ = _kept(node)
    return ([count * x.element_size(), count * torch.int64.itemsize],)


@graph_function(_exponential_sums)
def sharded_logsumexp(x: Tensor, dims: list[int], keepdim: bool, axis: str) -> Tensor:
    """Return `torch.logsumexp` over `dims`, one of which is sharded. The result has placement I.

    The backward keeps `x` and the result, no softmax.
    """
    result: Tensor = _LogSumExp.apply(x, dims, communicator(axis))  # type: ignore[no-untyped-call]
    return _squeezed(result, dims, keepdim)


@graph_function(_softmax)
def sharded_log_softmax(x: Tensor, dim: int, dtype: torch.dtype | None, axis: str) -> Tensor:
    """Return `torch.log_softmax` over the sharded `dim`, placed as `x`."""
    x = x if dtype is None else x.to(dtype)
    result: Tensor = _Softmax.apply(x, dim, communicator(axis), True)  # type: ignore[no-untyped-call]
    return result


@graph_function(_softmax)
def sharded_softmax(x: Tensor, dim: int, dtype: torch.dtype | None, axis: str) -> Tensor:
    """Return `torch.softmax` over the sharded `dim`, placed as `x`."""
    x = x if dtype is None else x.to(dtype)
    result: Tensor = _Softmax.apply(x, dim, communicator(axis), False)  # type: ignore[no-untyped-call]
    return result


@graph_function(_extreme)
def sharded_amax(x: Tensor, dims: list[int], keepdim: bool, axis: str) -> Tensor:
    """Return `torch.amax` over `dims`, one of which is sharded. The result has placement I."""
    result: Tensor = _Amax.apply(x, dims, communicator(axis))  # type: ignore[no-untyped-call]
    return _squeezed(result, dims, keepdim)


@graph_function(_extreme)
def sharded_amin(x: Tensor, dims: list[int], keepdim: bool, axis: str) -> Tensor:
    """Return `torch.amin` over `dims`, one of which is sharded. The result has placement I."""
    return -sharded_amax(-x, dims, keepdim, axis)


@graph_function(_place)
@torch.no_grad()
def sharded_argmax(x: Tensor, dim: int, keepdim: bool, axis: str) -> Tensor:
    """Return `torch.argmax` over the sharded `dim`: of equal values the first. Placement I."""
    comm = communicator(axis)
    here, where = x.max(dim, keepdim=keepdim)
    highest = comm.all_reduce(here, op="max")
    # Of equal values the first counts, so the smallest index among the ranks.
    absent = torch.iinfo(where.dtype).max
    where = (where + x.shape[dim] * comm.rank).masked_fill(here != highest, absent)
    return -comm.all_reduce(-where, op="max")


torch.library.define("ilm::outside", "(Tensor index, int size, int dim) -> Tensor")


def _outside(index: Tensor, size: int, dim: int) -> Tensor:
    """Which indices lie outside `size`: none on the CPU, where they raise as in torch."""
    unknown = (index < 0) | (index >= size)
    if unknown.device.type == "cpu" and unknown.any():
        raise IlmCompileError(
            f"gather: expected indices in [0, {size}) along dimension {dim}; got "
            f"{int(index[unknown][0])} ({int(unknown.sum())} such); check the labels against the "
            "model's vocabulary"
        )
    return unknown


torch.library.impl("ilm::outside", ("cpu", "cuda"), _outside)
torch.library.register_fake(
    "ilm::outside", lambda index, size, dim: index.new_empty(index.shape, dtype=torch.bool)
)


@graph_function()
def sharded_gather(x: Tensor, dim: int, index: Tensor, axis: str) -> Tensor:
    """Return this rank's part of `torch.gather` along the sharded `dim`; the rest is zero.

    `index` is the same on all ranks; the result, of its shape, has placement P. An index outside
    the whole dimension raises IlmCompileError on the CPU and gives NaN on CUDA.
    """
    comm = communicator(axis)
    width = x.shape[dim]
    unknown = torch.ops.ilm.outside(index, width * comm.size, dim)
    local = index - width * comm.rank
    absent = (local < 0) | (local >= width)
    picked = x.gather(dim, local.masked_fill(absent, 0)).masked_fill(absent, 0.0)
    return picked.masked_fill(unknown, nan) if picked.is_floating_point() else picked


@graph_function()
def sharded_nll_loss(
    log_probs: Tensor, target: Tensor, reduction: int, ignore_index: int, axis: str
) -> Tensor:
    """Return this rank's part of `F.nll_loss` of log-probabilities whose classes are sharded.

    log_probs: (tokens, classes / size, ...); target: (tokens, ...), the same on all ranks.
    `reduction` is ATen's. The result has placement P.
    """
    ignored = target == ignore_index
    index = target.masked_fill(ignored, 0).unsqueeze(1)
    losses = -sharded_gather(log_probs, 1, index, axis).squeeze(1).masked_fill(ignored, 0.0)
    if reduction == NONE:
        return losses
    return losses.sum() / (~ignored).sum() if reduction == MEAN else losses.sum()


@graph_function()
def partial_loss(name: str, x: Tensor, target: Tensor, axis: str, **options: Any) -> Tensor:
    """Return this rank's part of the mean of the elementwise loss ``aten::name``; placement P.

    `x` and `target` are sharded alike over `axis`.
    """
    result: Tensor = getattr(torch.ops.aten, name)(x, target, **options)
    return result / communicator(axis).size

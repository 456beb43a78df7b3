"""Products beside the collective before or behind them: asynchronous tensor parallelism.

An activation that is cut by tokens is gathered for products, or the partial sums of a product are
scattered by tokens. Here the pieces of one rank after another travel round a ring while the piece
that is there is multiplied (Wang et al., ASPLOS 2023, "Overlap communication with dependent
computation via decomposition"). The backward of one is the other. What is kept for it and what is
sent is what product and collective keep and send by themselves.

Shapes in this file: x (..., tokens, ..., K), weight (N, K), bias (N,), as of a linear layer; `dim`
is that of the tokens, of which a rank has one part in `size`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ilm_compile.kernels.library import as_written
from ilm_compile.program import symmetric_memory
from ilm_compile.program.bound import real
from ilm_compile.program.communicator import Communicator, communicator, communicators
from ilm_compile.program.functions import graph_function

torch.library.define(
    "ilm::gather_products",
    "(Tensor x, Tensor[] weights, Tensor?[] biases, int dim, str axis) -> Tensor[]",
)
torch.library.define(
    "ilm::products_scatter",
    "(Tensor[] xs, Tensor[] weights, Tensor? bias, int dim, str axis) -> Tensor",
)


@graph_function()
def gather_products(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], dim: int, axis: str
) -> tuple[Tensor, ...]:
    """Return the product of the gathered `x` and each of `weights`, with its bias if any.

    x: S(dim) on mesh axis `axis`; weights, biases: S(0), all in the same segments if any, as the
    results are S of the last dimension. The gathered x is kept for the gradients of the weights.
    """
    operands = (*weights, *biases)
    found: tuple[Tensor, ...] = _GatherProducts.apply(x, dim, axis, len(weights), *operands)  # type: ignore[no-untyped-call]
    return found


@graph_function()
def product_scatter(x: Tensor, weight: Tensor, bias: Tensor | None, dim: int, axis: str) -> Tensor:
    """Return this rank's tokens of the sum over all ranks of their products.

    x: S of the last dimension on mesh axis `axis`; weight: S(1); bias: P; the result: S(dim).
    """
    found: Tensor = _ProductScatter.apply(x, weight, bias, dim, axis)  # type: ignore[no-untyped-call]
    return found


class _GatherProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, axis: str, count: int, *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases = operands[:count], operands[count:]
        *results, whole = torch.ops.ilm.gather_products(x, weights, biases, dim, axis)
        is_trained = any(ctx.needs_input_grad[4 : 4 + count])
        ctx.save_for_backward(whole if is_trained else None, *weights)
        ctx.set_materialize_grads(False)
        ctx.where, ctx.comm = (dim, axis), communicator(axis)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        dim, axis = ctx.where
        known = [(g, w) for g, w in zip(grads, weights, strict=True) if g is not None]
        of_x = None
        if known and needed[0]:
            with communicators(**{axis: ctx.comm}):  # autograd may be in another thread
                of_x = torch.ops.ilm.products_scatter(
                    [g for g, _ in known], [w.t() for _, w in known], None, dim, axis
                )
        count = len(weights)
        of_weights = [
            None if g is None or not is_needed else _of_weight(g, whole)
            for g, is_needed in zip(grads, needed[4 : 4 + count], strict=True)
        ]
        of_biases = [
            None if g is None or not is_needed else _rows(g).sum(0)
            for g, is_needed in zip(grads, needed[4 + count :], strict=True)
        ]
        return of_x, None, None, None, *of_weights, *of_biases


class _ProductScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dim: int, axis: str
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.where, ctx.comm = (dim, axis), communicator(axis)
        found: Tensor = torch.ops.ilm.products_scatter([x], [weight], bias, dim, axis)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad
        dim, axis = ctx.where
        with communicators(**{axis: ctx.comm}):
            of_x, whole = torch.ops.ilm.gather_products(grad, [weight.t()], [None], dim, axis)
        return (
            of_x if needed[0] else None,
            _of_weight(whole, x) if needed[1] else None,
            _rows(whole).sum(0) if needed[2] else None,
            None,
            None,
        )


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _of_weight(grad: Tensor, x: Tensor) -> Tensor:
    return _rows(grad).t() @ _rows(x)


def _travel(comm: Communicator, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each rank and its `x`, this one's first, while the next is under way."""
    came = x.contiguous()
    for step in range(comm.size):
        wait = comm.shift([came]) if step + 1 < comm.size else None
        yield (comm.rank - step) % comm.size, came
        came = wait()[0] if wait else came


def _gather(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], dim: int, axis: str
) -> list[Tensor]:
    comm, part = real(axis), x.shape[dim]
    if near := symmetric_memory.near_ranks(comm, x):
        near.count_pieces(x)
        group = near.symmetric_group(x)
        return symmetric_memory.gather_products(x, weights, biases, dim, group)
    whole, *results = (x.new_empty(s) for s in _shapes(x, weights, dim, comm.size))
    for owner, piece in _travel(comm, x):
        place = dim, owner * part, part
        whole.narrow(*place).copy_(piece)
        for result, weight, bias in zip(results, weights, biases, strict=True):
            _multiply(piece, weight, bias, result.narrow(*place))
    return [*results, whole]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if not out.is_contiguous():
        out.copy_(F.linear(x, weight, bias))
    elif bias is None:
        torch.mm(_rows(x), weight.t(), out=out.view(-1, out.shape[-1]))
    else:
        torch.addmm(bias, _rows(x), weight.t(), out=out.view(-1, out.shape[-1]))


def _scatter(
    xs: list[Tensor], weights: list[Tensor], bias: Tensor | None, dim: int, axis: str
) -> Tensor:
    comm = real(axis)
    if near := symmetric_memory.near_ranks(comm, xs[0]):
        group = near.symmetric_group(xs[0])
        found = symmetric_memory.products_scatter(xs, weights, bias, dim, group)
        near.count_pieces(found)
        return found
    part = xs[0].shape[dim] // comm.size

    def own(owner: int) -> Tensor:
        pieces = [x.narrow(dim, owner * part, part) for x in xs]
        found = F.linear(pieces[0], weights[0], bias)
        for piece, weight in zip(pieces[1:], weights[1:], strict=True):
            _rows(found).addmm_(_rows(piece), weight.t())
        return found

    came = own((comm.rank - 1) % comm.size)
    for step in range(2, comm.size + 1):  # what comes is another rank's, and goes on to it
        wait = comm.shift([came])
        here = own((comm.rank - step) % comm.size)
        came = here.add_(wait()[0])
    return came


def _shapes(x: Tensor, weights: Sequence[Tensor], dim: int, size: int) -> list[list[int]]:
    """Of the gathered x, and of its products."""
    whole = list(x.shape)
    whole[dim] *= size
    return [whole, *([*whole[:-1], weight.shape[0]] for weight in weights)]


def _gather_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], dim: int, axis: str
) -> list[Tensor]:
    whole, *results = (x.new_empty(s) for s in _shapes(x, weights, dim, real(axis).size))
    return [*results, whole]


def _scatter_fake(
    xs: list[Tensor], weights: list[Tensor], bias: Tensor | None, dim: int, axis: str
) -> Tensor:
    shape = [*xs[0].shape[:-1], weights[0].shape[0]]
    shape[dim] //= real(axis).size
    return xs[0].new_empty(shape)


for _name, _run, _fake in (
    ("ilm::gather_products", _gather, _gather_fake),
    ("ilm::products_scatter", _scatter, _scatter_fake),
):
    torch.library.impl(_name, ("cpu", "cuda"), as_written(_run))
    torch.library.register_fake(_name, _fake)

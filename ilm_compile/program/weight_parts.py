"""Products that leave the gradient of their weight for later: the weight part, W, of a backward.

While a `WeightParts` collects, the backward of such a product finds the gradient of its input and
only notes what that of the weight takes: the input, the gradient of the result, and the place in
the autograd graph where the weight came from. `run` does the rest, casts and reductions of the
weight included. Otherwise such a product is the op that it stands for.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ilm_compile.kernels.grouped_product import weights_gradient
from ilm_compile.program.vocab import local_rows

aten = torch.ops.aten
Edge = tuple[Any, int]


@dataclass(frozen=True, slots=True)
class _Part:
    """One gradient of a weight, still to be computed and to be handed to `edge`."""

    gradient: Callable[[], Tensor]
    edge: GradientEdge

    @property
    def key(self) -> Edge:
        return self.edge.node, self.edge.output_nr


@dataclass
class WeightParts:
    """What the backward of one micro-batch in one stage has left for later."""

    _parts: list[_Part] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, part: _Part) -> None:
        """Note what is to be done."""
        self._parts.append(part)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Products that run in here, and again in a recompute, leave their weight parts here."""
        token = _collecting.set(self)
        try:
            yield
        finally:
            _collecting.reset(token)

    def run(self) -> None:
        """Add to the gradients of the weights, in the order of the backward; nothing is left.

        Of a weight that several products share, the sum goes back, as in a whole backward. The
        order is the same on all ranks of an axis, so that they meet in their reductions.
        """
        parts, self._parts = self._parts[::-1], []
        uses = Counter(part.key for part in parts)
        sums: dict[Edge, Tensor] = {}
        while parts:
            part = parts.pop()
            with torch.no_grad():
                grad = part.gradient()
                if part.key in sums:
                    grad = sums.pop(part.key) + grad
            uses[part.key] -= 1
            if uses[part.key]:
                sums[part.key] = grad
            else:
                torch.autograd.backward([part.edge], [grad])


_collecting: ContextVar[WeightParts | None] = ContextVar("collecting", default=None)
_Note = Callable[..., None]  # takes the gradient of the result, the value, and further arguments


def is_collecting() -> bool:
    """Whether products that run now leave their weight parts."""
    return _collecting.get() is not None and torch.is_grad_enabled()


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a checkpointed forward and of its second run, whose products must run alike."""
    parts = _collecting.get()
    return nullcontext(), nullcontext() if parts is None else parts.collect()


@dataclass(frozen=True, slots=True)
class _Weight:
    """What is known of a weight whose values may be gone."""

    shape: torch.Size
    stride: tuple[int, ...]


class _Leave(torch.autograd.Function):
    """The result of a product as it is; its backward notes the weight part.

    always: an empty tensor with a gradient, so that the backward comes here even where nothing
    else of the product has one.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, value: Tensor, always: Tensor, note: _Note) -> Tensor:
        ctx.save_for_backward(value)
        ctx.set_materialize_grads(False)
        ctx.note = note
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        if grad is not None:
            ctx.note(grad, ctx.saved_tensors[0].detach())
        return grad, None, None, None


@dataclass(frozen=True, slots=True)
class Product:
    """Of an op the places of its weight and of what meets it, and the gradient of the weight.

    dims: of the weight, for which alone `gradient(grad, value, weight, *others, **kwargs)` holds;
    others: the arguments that are no operands.
    """

    value: int
    weight: int
    dims: int
    gradient: Callable[..., Tensor]

    def leave(self, op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return the function that stands for the op in a graph, by a name that can be read."""

        def leave(*args: Any, **kwargs: Any) -> Tensor:
            return self.apply(op, *args, **kwargs)

        name = getattr(op, "_opname", "") or op.__name__
        leave.__name__ = leave.__qualname__ = f"{name}_leaving_weight"
        if inspect.isfunction(op):  # its names are asked for when a graph is bound
            leave.__signature__ = inspect.signature(op)  # type: ignore[attr-defined]
        _left[leave] = self, op
        return leave

    def note(self, weight: Tensor) -> _Note:
        """What leaves the gradient of `weight`, as it is found here, to who collects now."""
        parts = _collecting.get()
        assert parts is not None
        known, edge = _Weight(weight.shape, weight.stride()), get_gradient_edge(weight)

        def note(grad: Tensor, value: Tensor, *others: Any, **kwargs: Any) -> None:
            parts.add(_Part(lambda: self.gradient(grad, value, known, *others, **kwargs), edge))

        return note

    def apply(self, op: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The result of the op, whose weight part is left for later while that is asked for."""
        value, weight = args[self.value], args[self.weight]
        if not (is_collecting() and weight.requires_grad):
            return op(*args, **kwargs)
        given = list(args)
        given[self.weight] = weight.detach()
        if value.dim() > self.dims and not value.is_contiguous():
            # With a weight that needs no gradient torch would multiply matrix by matrix.
            given[self.value] = value.contiguous()
        result = op(*given, **kwargs)
        others, note = self.others(args), self.note(weight)
        always = result.new_empty(0).requires_grad_()
        left: Tensor = _Leave.apply(  # type: ignore[no-untyped-call]
            result, value, always, lambda grad, value: note(grad, value, *others, **kwargs)
        )
        return left

    def others(self, args: Sequence[Any]) -> list[Any]:
        """Those of the positional arguments that are neither the value nor the weight."""
        return [a for i, a in enumerate(args) if i not in (self.value, self.weight)]


_left: WeakKeyDictionary[Any, tuple[Product, Callable[..., Tensor]]] = WeakKeyDictionary()


def left_by(target: Any) -> tuple[Product, Callable[..., Tensor]] | None:
    """The product and the op that a function of `Product.leave` stands for, None for any other."""
    return _left.get(target) if inspect.isfunction(target) else None


def of_mm(grad: Tensor, value: Tensor, weight: _Weight) -> Tensor:
    """In the layout of the weight, as torch has it."""
    if weight.stride == (1, weight.shape[0]):
        return (grad.t() @ value).t()
    return value.t() @ grad


def of_matmul(grad: Tensor, value: Tensor, weight: _Weight) -> Tensor:
    rows, width = value.reshape(-1, value.shape[-1]), grad.shape[-1]
    return of_mm(grad.reshape(-1, width), rows, weight)


def of_linear(grad: Tensor, value: Tensor, weight: _Weight, bias: Tensor | None = None) -> Tensor:
    transposed = _Weight(torch.Size(reversed(weight.shape)), weight.stride[::-1])
    return of_matmul(grad, value, transposed).t()


def of_addmm(
    grad: Tensor, value: Tensor, weight: _Weight, bias: Tensor, *, alpha: float = 1, beta: float = 1
) -> Tensor:
    found = of_mm(grad, value, weight)
    return found if alpha == 1 else found * alpha


def of_bmm(grad: Tensor, value: Tensor, weight: _Weight) -> Tensor:
    return value.transpose(1, 2) @ grad


def of_grouped(
    grad: Tensor, value: Tensor, weight: _Weight, *others: Tensor, **kwargs: Tensor
) -> Tensor:
    found: Tensor = aten._grouped_mm.default(value.t(), grad, *others, **kwargs)
    return found


def of_groups(grad: Tensor, value: Tensor, weight: _Weight, offs: Tensor) -> Tensor:
    bounds = [0, *offs.tolist()]
    return torch.stack([value[a:b].t() @ grad[a:b] for a, b in pairwise(bounds)])


def of_rows(grad: Tensor, value: Tensor, weight: _Weight, offs: Tensor) -> Tensor:
    return weights_gradient(grad, value, offs)


def of_embedding(grad: Tensor, indices: Tensor, weight: _Weight, padding_idx: int = -1) -> Tensor:
    backward = aten.embedding_dense_backward.default
    found: Tensor = backward(grad, indices, weight.shape[0], padding_idx, False)
    return found


def of_vocab_embedding(
    grad: Tensor, indices: Tensor, weight: _Weight, padding_idx: int, axis: str
) -> Tensor:
    local, absent, padding = local_rows(indices, weight.shape[0], padding_idx, axis)
    return of_embedding(grad.masked_fill(absent.unsqueeze(-1), 0.0), local, weight, padding)

"""Autograd functions whose backward is not the derivative of their forward, kept as ops.

A straight-through estimator or a bound on a gradient: the graph gets one op that runs the user's
forward, and in backward the user's backward. What the forward saves is made anew there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.utils._pytree import tree_flatten, tree_unflatten

_OPS: dict[object, Any] = {}


@dataclass
class Context:
    """What a function's forward and backward are given as ``ctx``."""

    needs_input_grad: Sequence[bool] = ()
    saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def _ignore(self, *_: Any) -> None:
        """These speak of torch's own bookkeeping."""

    mark_dirty = mark_non_differentiable = set_materialize_grads = save_for_forward = _ignore


def run_forward(cls: Any, args: tuple[Any, ...]) -> tuple[Any, Context]:
    """Run the forward of `cls` as ordinary ops; return its result and what it left in its ctx."""
    context = Context([isinstance(a, Tensor) and a.is_floating_point() for a in args])
    if cls.setup_context is Function.setup_context:
        return cls.forward(context, *args), context
    result = cls.forward(*args)
    cls.setup_context(context, args, result)
    return result, context


def apply_as_op(cls: Any, args: tuple[Any, ...], *, is_pointwise: bool) -> Any:
    """Return what `cls` makes of `args`, as one op that is differentiated by its own backward."""
    leaves, spec = tree_flatten(args)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    key = (cls, repr(others), str(spec))
    if key not in _OPS:
        _OPS[key] = _register(_Kept(cls, leaves, spec), is_pointwise)
    return _OPS[key](*tensors)


class _Kept:
    """A function with the arguments that are no tensors filled in."""

    def __init__(self, cls: Any, leaves: Sequence[Any], spec: Any) -> None:
        self.cls, self.spec = cls, spec
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the arguments with `tensors` in their places."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return tuple(tree_unflatten(leaves, self.spec))

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the result in memory of its own, as an op must."""
        result: Tensor = run_forward(self.cls, self.arguments(tensors))[0]
        return result.clone()

    def backward(self, saved: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the tensors."""
        args = self.arguments(saved.saved_tensors)
        with torch.no_grad():
            _, context = run_forward(self.cls, args)
            found = self.cls.backward(context, gradient)
        by_argument = found if isinstance(found, tuple) else (found,)
        return tuple(by_argument[place] for place in self.places)


def _register(kept: _Kept, is_pointwise: bool) -> Any:
    name = f"ilm_user::{kept.cls.__name__.lower()}_{len(_OPS)}"
    inputs = ", ".join(f"Tensor x{i}" for i in range(len(kept.places)))
    op = torch.library.custom_op(
        name,
        kept.forward,
        mutates_args=(),
        schema=f"({inputs}) -> Tensor",
        tags=(torch.Tag.pointwise,) if is_pointwise else (),
    )
    op.register_fake(kept.forward)
    op.register_autograd(
        kept.backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    return op

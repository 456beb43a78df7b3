"""User-written `torch.autograd.Function`s, of which torch.export captures the forward alone.

The captured graph differentiates that forward as it stands. Where the user's backward is the same
derivative, written by hand, nothing is lost; where it is not (a straight-through estimator, a bound
on a gradient), training would differ without a word. So each is tried on random numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, _SingleLevelFunction
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.checkpoint import CheckpointFunction, check_backward_validity

from ilm_compile.errors import TraceError

LARGEST, SHRUNK = 64, 8  # dimensions above the one are tried with the other
TOLERANCE = 1e-6


@contextmanager
def checked_functions() -> Iterator[None]:
    """While it runs, a function whose backward is not the derivative of its forward is refused.

    Raises `TraceError` where such a function is applied.
    """
    known: dict[type, str] = {}

    def apply(cls: Any, *args: Any) -> Any:
        if issubclass(cls, CheckpointFunction):
            return _checkpointed(*args)
        if not cls.__module__.startswith(("torch.", "ilm_compile.")):
            if cls not in known:
                known[cls] = _fault(cls, args)
            if known[cls]:
                raise TraceError(
                    f"trace: the backward of the autograd function {cls.__qualname__} "
                    f"({cls.__module__}) {known[cls]}; torch.export captures its forward alone, so "
                    "its gradient would be another one. Write it with ordinary ops and .detach(), "
                    "or as a torch.library.custom_op with register_autograd"
                )
        return _apply(cls, args)

    # Between Function.apply, which a model may have bound to a name long ago, and torch's C++.
    _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del _SingleLevelFunction.apply  # type: ignore[attr-defined]


def _checkpointed(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    """Run the body of a reentrant checkpoint with its gradients: what is recomputed, a plan says.

    Without a gradient to any input torch gives none to the body's weights either, and says so.
    """
    check_backward_validity(args)
    with torch.set_grad_enabled(any(isinstance(x, Tensor) and x.requires_grad for x in args)):
        return function(*args)


def _apply(cls: Any, args: tuple[Any, ...]) -> Any:
    return super(_SingleLevelFunction, cls).apply(*args)


def _fault(cls: Any, args: tuple[Any, ...]) -> str:
    """Return what is wrong with the backward of `cls` in words, empty if nothing is."""
    found: list[str] = []

    def run() -> None:  # on a thread of its own: tracing holds for one thread only
        try:
            applied = _gradients(lambda *a: _apply(cls, a), _random(args))
            derived = _gradients(lambda *a: _forward(cls, a), _random(args))
        except Exception as error:
            found.append(f"cannot be tried on random numbers ({type(error).__name__}: {error})")
            return
        if not all(map(_equal, applied, derived)):
            found.append("is not the derivative of its forward")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0] if found else ""


def _random(args: tuple[Any, ...]) -> Any:
    generator = torch.Generator().manual_seed(0)

    def like(x: Tensor) -> Tensor:
        shape = [n if n <= LARGEST else SHRUNK for n in x.shape]
        if not x.is_floating_point():
            return torch.zeros(shape, dtype=x.dtype)  # a valid index, if it is one
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return tree_map_only(Tensor, like, args)


def _forward(cls: Any, args: tuple[Any, ...]) -> Any:
    """Run the forward as ordinary ops."""
    if cls.setup_context is not Function.setup_context:
        return cls.forward(*args)
    nothing = dict.fromkeys(
        ("save_for_backward", "mark_dirty", "mark_non_differentiable", "set_materialize_grads"),
        lambda *_: None,
    )
    context = SimpleNamespace(needs_input_grad=[isinstance(a, Tensor) for a in args], **nothing)
    return cls.forward(context, *args)


def _gradients(function: Any, args: Any) -> list[Tensor]:
    """Return the gradients of all inputs, for output gradients drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    outputs = [y for y in tree_flatten(function(*args))[0] if _is_trained(y)]
    seeds = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    inputs = [x for x in tree_flatten(args)[0] if _is_trained(x)]
    gradients = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]


def _is_trained(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)

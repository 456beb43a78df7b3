"""User-written `torch.autograd.Function`s, of which torch.export captures the forward alone.

The captured graph differentiates that forward as it stands. Where the user's backward is the same
derivative, written by hand, nothing is lost; where it is not, training would differ without a word.
So each is tried on random numbers, and then captured as its forward, kept as an op with a backward
of its own, taken as a term of the loss, or refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.utils.checkpoint import CheckpointFunction, check_backward_validity

from ilm_compile.errors import TraceError
from ilm_compile.program.function_trial import Verdict, tried
from ilm_compile.program.own_backward import apply_as_op, run_forward
from ilm_compile.program.users_line import users_line


@contextmanager
def kept_functions() -> Iterator[list[Tensor]]:
    """While it runs, functions keep their own backward; yields the terms that they add to a loss.

    The terms are of value zero: their gradient is what counts. Raises `TraceError` where a function
    is applied that cannot be kept.
    """
    known: dict[object, Verdict] = {}
    terms: list[Tensor] = []

    def apply(cls: Any, *args: Any) -> Any:
        if issubclass(cls, CheckpointFunction):
            return _checkpointed(*args)
        if cls.__module__.startswith(("torch.", "ilm_compile.")):
            return _apply(cls, args)
        key = (cls, *(tuple(a.shape) if isinstance(a, Tensor) else repr(a) for a in args))
        if key not in known:
            known[key] = tried(lambda *a: _apply(cls, a), cls, args)
        return _captured(cls, args, known[key], terms)

    # Between Function.apply, which a model may have bound to a name long ago, and torch's C++.
    _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield terms
    finally:
        del _SingleLevelFunction.apply  # type: ignore[attr-defined]


def _captured(cls: Any, args: tuple[Any, ...], verdict: Verdict, terms: list[Tensor]) -> Any:
    if verdict.fault:
        raise TraceError(
            f"trace: the backward of the autograd function {cls.__qualname__} ({cls.__module__}) "
            f"{verdict.fault}{users_line()}; write it with ordinary ops and .detach(), or as a "
            "torch.library.custom_op with register_autograd"
        )
    for place, factor in verdict.added.items():
        term = factor * args[place].sum()
        terms.append(term - term.detach())
    rest = tuple(a.detach() if i in verdict.added else a for i, a in enumerate(args))
    if verdict.is_derivative:
        return run_forward(cls, rest)[0] if verdict.added else _apply(cls, rest)
    return apply_as_op(cls, rest, is_pointwise=verdict.is_pointwise)


def _checkpointed(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
    """Run the body of a reentrant checkpoint with its gradients: what is recomputed, a plan says.

    Without a gradient to any input torch gives none to the body's weights either, and says so.
    """
    check_backward_validity(args)
    with torch.set_grad_enabled(any(isinstance(x, Tensor) and x.requires_grad for x in args)):
        return function(*args)


def _apply(cls: Any, args: tuple[Any, ...]) -> Any:
    return super(_SingleLevelFunction, cls).apply(*args)

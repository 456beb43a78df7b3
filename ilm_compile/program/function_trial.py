"""What an autograd function's backward is, found by trying it on random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from ilm_compile.program.known import away_from_capture
from ilm_compile.program.own_backward import run_forward

LARGEST, SHRUNK = 64, 8  # dimensions above the one are tried with the other
TOLERANCE = 1e-6


@dataclass
class Verdict:
    """What was found of a function.

    fault: why it cannot be captured, in words. is_derivative: its backward is that of its forward,
    but for the arguments in `added`. is_pointwise: an element of the result, and of a gradient,
    depends on the elements at its place alone. added: of each argument whose gradient is a number
    whatever gradient comes, by position, that number: the function adds a term to the loss.
    """

    fault: str = ""
    is_derivative: bool = False
    is_pointwise: bool = False
    added: dict[int, float] = field(default_factory=dict)


def tried(apply: Callable[..., Any], cls: Any, args: tuple[Any, ...]) -> Verdict:
    """Return what the function `cls` is on arguments like `args`. `apply`: torch's own."""

    def forward(*args: Any) -> Any:
        return run_forward(cls, args)[0]

    try:
        return away_from_capture(lambda: _judged(apply, forward, _random(args)))
    except Exception as error:
        return Verdict(f"cannot be tried on random numbers ({type(error).__name__}: {error})")


def _judged(apply: Callable[..., Any], forward: Callable[..., Any], args: Any) -> Verdict:
    own, derived = _gradients(apply, args, 1), _gradients(forward, args, 1)
    if not any(bool(x.isfinite().any()) for x in own):
        return Verdict("gives no numbers where it was tried on random ones")
    if all(map(_equal, own, derived)):
        return Verdict(is_derivative=True)
    results = tree_flatten(apply(*args))[0]
    if len(results) != 1 or not isinstance(results[0], Tensor):
        return Verdict("is not the derivative of its forward, and it has several results")
    if not _equal(results[0], apply(*args)):
        return Verdict("is not the derivative of its forward, and it draws random numbers")
    other, both = _gradients(apply, args, 2), _gradients(apply, args, 1, 2)
    added, places, is_derivative = {}, [i for i, x in enumerate(args) if _is_trained(x)], True
    for place, a, b, total, plain in zip(places, own, other, both, derived, strict=True):
        if _equal(a + b, total):
            is_derivative = is_derivative and _equal(a, plain)
            continue
        if not (_equal(a, b) and _equal(a, total) and _equal(a, a.mean().expand_as(a))):
            return Verdict(
                "is not linear in the gradient that it is given, so that the number of "
                "micro-batches would change what it does (clip gradients by the trainer instead)"
            )
        added[place] = float(a.mean())
    is_pointwise = not is_derivative and _is_pointwise(apply, args)
    return Verdict(is_derivative=is_derivative, is_pointwise=is_pointwise, added=added)


def _random(args: tuple[Any, ...]) -> Any:
    generator = torch.Generator().manual_seed(0)

    def like(x: Tensor) -> Tensor:
        shape = [n if n <= LARGEST else SHRUNK for n in x.shape]
        if not x.is_floating_point():
            return torch.zeros(shape, dtype=x.dtype)  # a valid index, if it is one
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return tree_map_only(Tensor, like, args)


def _gradients(function: Any, args: Any, *seeds: int) -> list[Tensor]:
    """Return the gradients of all inputs, for the sum of output gradients drawn from `seeds`."""
    outputs = [y for y in tree_flatten(function(*args))[0] if _is_trained(y)]
    inputs = [x for x in tree_flatten(args)[0] if _is_trained(x)]
    starts = [sum(_drawn(y, seed) for seed in seeds) for y in outputs]
    gradients = torch.autograd.grad(outputs, inputs, starts, allow_unused=True)  # type: ignore[arg-type]
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]


def _drawn(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _is_pointwise(apply: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether reordered elements give the same in that order, and others leave those be."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if len({x.shape for x in tensors}) != 1 or tree_flatten(apply(*args))[0][0].shape != (
        tensors[0].shape
    ):
        return False
    count = tensors[0].numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(3))
    is_other = torch.arange(count) % 2 == 0

    def both(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        given = tree_map_only(
            Tensor, lambda x: change(x.detach()).requires_grad_(x.requires_grad), args
        )
        result = apply(*given)
        inputs = [x for x in given if _is_trained(x)]
        return [result, *torch.autograd.grad(result, inputs, change(_drawn(result, 1)))]

    def mixed(x: Tensor) -> Tensor:
        return torch.where(is_other.view_as(x), 2 * x + 1, x)

    plain = both(lambda x: x)
    reordered, partly = both(lambda x: x.flatten()[order].view_as(x)), both(mixed)
    return all(
        _equal(x.flatten()[order], y.flatten()) for x, y in zip(plain, reordered, strict=True)
    ) and all(
        _equal(x.flatten()[~is_other], y.flatten()[~is_other])
        for x, y in zip(plain, partly, strict=True)
    )


def _is_trained(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)

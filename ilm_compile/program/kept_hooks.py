"""A parameter's own gradient hooks, kept where it makes no difference that ranks hold parts of it.

`Parameter.register_hook` and `register_post_accumulate_grad_hook` see the gradient of one backward.
Here that is the gradient of the whole global batch, all micro-batches and ranks added up: what one
backward of the whole batch gives, once each time the schedule is executed, before clipping. A rank
has a part of it, and shows the hook a whole tensor with zeros elsewhere: so an element of the
result may depend on its own place, as with a mask, but on no other element. That is found by trying
the hook on random numbers; a norm, a mean or noise is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6
_SCALES = (1e-4, 1.0, 1e4)  # of the gradients that are tried: a hook may have a threshold


@dataclass(frozen=True, slots=True)
class GradientHook:
    """function: the user's, of a gradient, or of a parameter with its ``.grad`` if `is_post`.

    device: on which it runs, that of the user's parameter; None for wherever the gradient is.
    """

    function: Callable[[Any], Any]
    is_post: bool
    device: torch.device | None = None

    def __call__(self, grad: Tensor, value: Tensor) -> Tensor:
        """Return what the hook makes of a whole gradient; `value` is the parameter's."""
        given = grad.to(self.device or grad.device)
        with torch.no_grad():  # as in backward
            if self.is_post:
                parameter = nn.Parameter(value.detach().to(given.device))
                parameter.grad = given
                self.function(parameter)
                result = parameter.grad
            else:
                result = self.function(given)
        return (given if result is None else result).to(grad)

    def resized(self, shape: Sequence[int]) -> GradientHook:
        """Return one of the same kind for a parameter that a proof has made smaller: a factor for
        each element, as the user's own may be written for one shape."""

        def factor(grad: Tensor) -> Tensor:
            steps = torch.linspace(0.5, 1.5, grad.numel(), dtype=grad.dtype, device=grad.device)
            return grad * steps.view(tuple(shape))

        def scale(parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            parameter.grad = factor(parameter.grad)

        return replace(self, function=scale if self.is_post else factor)


def apply_hooks(
    hooks: Sequence[GradientHook], grad: Tensor, value: Tensor, *, scale: float = 1.0
) -> Tensor:
    """Return what `hooks` make of a whole gradient, one after the other.

    scale: what the gradient was multiplied by, which the user's function does not see.
    """
    if not hooks:
        return grad
    grad = grad / scale
    for hook in hooks:
        grad = hook(grad, value)
    return grad * scale


def fault_of(hook: GradientHook, like: Tensor) -> str:
    """Return in words why the hook of a parameter like this one cannot be kept, "" if it can."""
    try:
        with torch.no_grad():
            return next(_faults(hook, like), "")
    except Exception as error:
        return f"cannot be tried on a random gradient ({type(error).__name__}: {error})"


def _faults(hook: GradientHook, like: Tensor) -> Iterator[str]:
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu") if like.is_meta else like.device
    hook = replace(hook, device=None)

    def random() -> Tensor:
        return torch.randn(like.shape, generator=generator).to(device, like.dtype)

    def run(grad: Tensor, value: Tensor) -> Tensor:
        return hook(grad.clone(), value.clone())

    grad, value = random(), random()
    yield from _direct_faults(hook, grad, value)
    if not _equal(run(grad, value), run(grad, value)):
        yield "does not give the same twice"
    others = (torch.zeros_like(grad), 1e12 * random(), torch.full_like(grad, torch.nan))
    for scale in _SCALES:
        expected = run(scale * grad, value)
        for other in others:
            own = torch.rand(like.shape, generator=generator).to(device) < 0.5
            for kept in (own, ~own):
                mixed = run(
                    torch.where(kept, scale * grad, other),
                    torch.where(kept, value, torch.zeros_like(value)),
                )
                if not _equal(mixed[kept], expected[kept]):
                    yield (
                        "makes more of an element than that element and its place say (of a norm, "
                        "a mean, another element): a rank holds a part of the gradient only"
                    )
    if bool(run(torch.zeros_like(grad), torch.zeros_like(grad)).any()):
        yield "makes something of a gradient that is zero"


def _direct_faults(hook: GradientHook, grad: Tensor, value: Tensor) -> Iterator[str]:
    """What one call shows: what is returned, and what is changed besides."""
    given, parameter = grad.clone(), nn.Parameter(value.clone())
    if hook.is_post:
        parameter.grad = given
        if hook.function(parameter) is not None:
            yield "returns something, which torch refuses too"
        result = parameter.grad
        if not torch.equal(parameter.detach(), value):
            yield "changes the parameter, not only its gradient"
        if result is None:
            yield "takes the gradient away"
    else:
        result = hook.function(given)
    looks_on = result is None or (hook.is_post and result is given)
    if looks_on and torch.equal(given, grad):
        yield "only looks at the gradient, of which a rank holds a part (see full_gradients())"
    if isinstance(result, Tensor) and (result.shape, result.dtype) != (grad.shape, grad.dtype):
        yield (
            f"makes {tuple(result.shape)} {result.dtype} of {tuple(grad.shape)} {grad.dtype}, "
            "which torch refuses too"
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=0, equal_nan=True)

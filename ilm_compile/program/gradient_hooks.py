"""What changes a gradient outside the forward graph: hooks, of which a capture knows nothing.

A program holds the forward pass; what a user hangs on tensors and modules to run in backward would
vanish without a word. Hooks of parameters that work element by element are kept
(`ilm_compile.program.kept_hooks`); each other kind is refused by its name, with the user's line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as module_hooks
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from ilm_compile.errors import TraceError
from ilm_compile.program.kept_hooks import GradientHook, fault_of
from ilm_compile.program.known import written
from ilm_compile.program.users_line import called_from, defined_at, is_users_file, users_line

# Where a module, a parameter and torch itself keep them, and what they are called.
_OF_MODULE = {
    "_backward_pre_hooks": "a full backward pre-hook",
    "_backward_hooks": "a backward hook",
}
# Where torch keeps those of a parameter, and what registers them, in the order of their calls.
OF_PARAMETER = {
    "_backward_hooks": "register_hook",
    "_post_accumulate_grad_hooks": "register_post_accumulate_grad_hook",
}
_POST = "_post_accumulate_grad_hooks"
_GLOBAL = {
    "_global_backward_pre_hooks": "a global module backward pre-hook",
    "_global_backward_hooks": "a global module backward hook",
}
_PROPERTIES = vars(torch._C.TensorBase)
_IN_FORWARD: dict[Any, str] = {
    Tensor.register_hook: "hangs a gradient hook on a value (Tensor.register_hook)",
    Tensor.register_post_accumulate_grad_hook: "registers a post-accumulate hook",
    Tensor.retain_grad: "keeps the gradient of a value (Tensor.retain_grad)",
    Tensor.backward: "runs backward inside its forward",
    torch.autograd.grad: "takes gradients inside its forward (torch.autograd.grad)",
    _PROPERTIES["data"].__set__: "replaces the .data of a tensor",
    _PROPERTIES["grad_fn"].__get__: "reads grad_fn, the backward graph",
}
_WAY_OUT = (
    "the program holds the forward pass alone, so it would be lost. Remove it and write what it "
    "does to the gradient in the forward (a factor of f: x * f + (x * (1 - f)).detach()), or "
    "change the gradients between backward and the optimizer's step"
)


def kept_gradient_hooks(model: nn.Module) -> dict[str, tuple[GradientHook, ...]]:
    """Return the hooks of parameters by name, each tried on random gradients of its parameter.

    Raises `TraceError` naming the first hook of `model` that would run in backward and cannot be
    kept.
    """
    for attribute, kind in _GLOBAL.items():
        _refuse(getattr(module_hooks, attribute), kind, "all modules")
    for path, module in model.named_modules():
        for attribute, kind in _OF_MODULE.items():
            _refuse(getattr(module, attribute, None), kind, path or type(model).__name__)
    kept = {name: tuple(_kept(name, p)) for name, p in model.named_parameters()}
    return {name: hooks for name, hooks in kept.items() if hooks}


def _kept(name: str, parameter: nn.Parameter) -> Iterator[GradientHook]:
    device = None if parameter.is_meta else parameter.device
    for attribute, kind in OF_PARAMETER.items():
        for function in (getattr(parameter, attribute, None) or {}).values():
            hook = GradientHook(function, attribute == _POST, device)
            if fault := fault_of(hook, parameter.detach()):
                raise TraceError(
                    f"trace: {name} has a hook by {kind}, {defined_at(function)}, which {fault}; "
                    f"{_WAY_OUT}"
                )
            yield hook


def _refuse(hooks: dict[int, Any] | None, kind: str, owner: str) -> None:
    if hooks:
        hook = defined_at(next(iter(hooks.values())))
        raise TraceError(f"trace: {owner} has {kind}, {hook}; {_WAY_OUT}")


_DETACH = (Tensor.detach, torch.detach, _PROPERTIES["data"].__get__)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class NoGradientHooks(TorchFunctionMode):
    """While active, a forward that reaches for its own backward is refused where it does."""

    def __init__(self) -> None:
        super().__init__()
        self._detached: dict[int, Tensor] = {}  # by storage; held, so that it stays its own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Until torch 2.11 activation checkpointing asks its own value whether it has one.
        if (words := _IN_FORWARD.get(func)) and not called_from(checkpoint):
            raise TraceError(f"trace: the model {words}{users_line()}; {_WAY_OUT}")
        kwargs = kwargs or {}
        if (target := written(getattr(func, "__name__", ""), args, kwargs)) is not None:
            self._check_write(target)
        result = func(*args, **kwargs)
        if func in _DETACH and args[0].requires_grad:
            self._detached[_storage(args[0])] = args[0]
        return result

    def _check_write(self, target: Tensor) -> None:
        """Refuse a write through ``.data`` or ``.detach()``, which changes a value unseen."""
        if not target.requires_grad and _storage(target) in self._detached:
            raise TraceError(
                f"trace: the model changes the .data of a value (or what .detach() gives) in "
                f"place{users_line()}, so that autograd does not see it. Compute a new value, or "
                "change weights outside of the forward"
            )


@contextmanager
def no_saved_tensor_hooks() -> Iterator[None]:
    """While it runs, saved-tensor hooks of the user are refused: packing may change a value."""
    original = saved_tensors_hooks.__init__

    def init(self: Any, pack_hook: Any, unpack_hook: Any) -> None:
        code = getattr(pack_hook, "__code__", None)
        if code is not None and is_users_file(code.co_filename):
            raise TraceError(
                f"trace: the model saves activations through a hook, {defined_at(pack_hook)}"
                f"{users_line()}; {_WAY_OUT}"
            )
        original(self, pack_hook, unpack_hook)

    saved_tensors_hooks.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        saved_tensors_hooks.__init__ = original  # type: ignore[method-assign]

"""What every op of this folder shares: how its implementations are bound to devices.

An op is a schema (`torch.library.define`), a plain torch reference for the CPU, a Triton kernel for
CUDA, a fake that computes shapes only, and a backward that is an op of its own. Triton is imported
by the first call on CUDA, so the ops exist, trace and run on the CPU with no triton installed.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ilm_compile.errors import IlmCompileError

Implementation = Callable[..., Any]


# Kept in a name: an implementation lives as long as the library that it came by.
_RULES = torch.library.Library("ilm", "FRAGMENT")  # type: ignore[no-untyped-call]
# Op -> where its Triton launcher is, as `module:function`.
LAUNCHERS: dict[str, str] = {}


def implement(op: str, reference: Implementation, triton: str) -> None:
    """Bind an op to its devices: the reference on the CPU, a Triton launcher on CUDA.

    op: `ilm::name`. triton: `module:function`, called with the op's arguments.
    """
    LAUNCHERS[op] = triton
    torch.library.impl(op, "cpu", as_written(reference))
    torch.library.impl(op, "cuda", on_cuda(op, reference))


def differentiable(op: str, save: Callable[..., None], differentiate: Callable[..., Any]) -> None:
    """Give an op its backward, at half of what `torch.library.register_autograd` takes of the host.

    op: `ilm::name`, whose arguments all have a place. save, differentiate: as the setup_context and
    the backward there.
    """
    overload = getattr(torch.ops.ilm, op.removeprefix("ilm::")).default
    defaults = tuple(argument.default_value for argument in overload._schema.arguments)

    class Rule(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = overload(*inputs)
            save(ctx, inputs, output)
            return output

        backward = staticmethod(differentiate)

    def run(*given: Any) -> Any:
        inputs = given + defaults[len(given) :]  # the dispatcher leaves out what is as by default
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Rule.apply(*inputs)  # type: ignore[no-untyped-call]
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*inputs)

    Rule.__name__ = Rule.__qualname__ = op
    _RULES.impl(op.removeprefix("ilm::"), run, "Autograd")  # type: ignore[no-untyped-call]


def as_written(reference: Implementation) -> Implementation:
    """`reference` in the dtypes that it says: a caller's autocast does not reach into an op."""

    def run(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return reference(*args)
        with torch.autocast("cpu", enabled=False):
            return reference(*args)

    return run


def on_cuda(op: str, reference: Implementation) -> Implementation:
    """What runs on CUDA: the launcher, or the reference where a tensor is float64.

    float64 is for proofs, and the kernels compute in float32.
    """

    def choose(*args: Any) -> Any:
        if any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args):
            return reference(*args)
        return launcher(op, LAUNCHERS[op])(*args)

    return choose


@cache
def launcher(op: str, target: str) -> Implementation:
    """The function that `module:function` names. Raises IlmCompileError where triton is missing."""
    module, function = target.split(":")
    try:
        found: Implementation = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise IlmCompileError(
            f"{op}: expected triton, which compiles this kernel for CUDA tensors; got '{error}'. "
            f"Install it with pip install 'ilm_compile[triton]', or compile without fused kernels"
        ) from error
    return found


def exact_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where a tensor has it."""
    found = torch.float32
    for tensor in tensors:
        found = torch.promote_types(found, tensor.dtype)
    return found

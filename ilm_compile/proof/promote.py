"""Float64 runs of models that cast to float32 inside, so that parity can be checked to 1e-10."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ilm_compile.program.expert_rows import grouped_product

_CASTS = {Tensor.float, Tensor.to, Tensor.type, torch.softmax, F.softmax, F.log_softmax}
# Which want one dtype of all that they multiply.
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm, Tensor.bmm}
_PRODUCTS |= {Tensor.__rmatmul__, Tensor.mm, torch.einsum, F.linear}
_GROUPED = {f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f}


def _overflows(fill_value: Any, **options: Any) -> bool:
    """Whether a number, such as the least of float64, is too large for the default dtype."""
    limit = torch.finfo(torch.get_default_dtype()).max
    return isinstance(fill_value, float) and limit < abs(fill_value) < float("inf")


class _KeepFloat64(TorchFunctionMode):
    """Drops the request for float32 from casts, and from softmax, of a float64 tensor."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _GROUPED and args[0].dtype == torch.float64:
            return grouped_product(*args, **kwargs)
        if func in _PRODUCTS and torch.float64 in _dtypes(args):
            args = tree_map_only(Tensor, _widened, args)  # integers, or tables, as float32
        if func is torch.full and "dtype" not in kwargs and _overflows(*args[1:], **kwargs):
            kwargs["dtype"] = torch.float64
        if func in _CASTS and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


_LOW = {torch.float32, torch.bfloat16, torch.float16}
_SHORT = {Tensor.float, Tensor.bfloat16, Tensor.half}
# What a graph holds as a constant, with the digits that its dtype leaves.
_HELD = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor}


class _Float64Throughout(_KeepFloat64):
    """Besides, makes and casts in float64 whatever the code wants in a smaller floating dtype."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _SHORT:
            return args[0].double()
        if func in _HELD:
            held = func(*args, **kwargs)
            if held.is_floating_point() and kwargs.get("dtype") is None:
                held = func(*args, **{**kwargs, "dtype": torch.float32})
            return held.double() if held.is_floating_point() else held
        name = str(getattr(func, "__name__", ""))
        if not name.endswith("_"):  # not where a tensor is changed or asked for what it is
            args, kwargs = tree_map_only(Tensor, _widened, (args, kwargs))
        args, kwargs = tree_map_only(torch.dtype, _wide, (args, kwargs))
        return super().__torch_function__(func, types, args, kwargs)


def _dtypes(args: tuple[Any, ...]) -> set[torch.dtype]:
    return {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.dtype in _LOW else tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype in _LOW else dtype


@contextmanager
def float64_throughout() -> Iterator[None]:
    """While it runs, what is made without a dtype or in a smaller one is float64, and stays so."""
    with float64_default(), _Float64Throughout():
        yield


@contextmanager
def float64_default() -> Iterator[None]:
    """While it runs, a quotient of integers is float64, as every value of an exact program is."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


@contextmanager
def promoted_float32() -> Iterator[None]:
    """While it runs, float64 tensors stay float64 where the code asks for float32."""
    with _KeepFloat64():
        yield


def to_float64(model: nn.Module) -> nn.Module:
    """The model in float64, in place.

    Rotary `inv_freq` buffers of Hugging Face models are made again from their config: those of a
    float32 model carry float32 rounding, which 1e-10 would show.
    """
    model.double()
    for module in model.modules():
        if isinstance(getattr(module, "inv_freq", None), Tensor):
            config: Any = module.config
            head_dim = getattr(config, "head_dim", None)
            head_dim = head_dim or config.hidden_size // config.num_attention_heads
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
            inv_freq = config.rope_parameters["rope_theta"] ** -exponents
            module.inv_freq = inv_freq.to(module.inv_freq.device)
    return model

"""Constants that a model makes in its forward, in the form that shards best.

The index list of ``x[:, [-2]]`` would become a tensor of one index; here it becomes a slice. The
value of a fill may be a tensor, which torch reads as a number; here it is spread over the shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_READ_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


class KeepConstants(TorchFunctionMode):
    """While active, rewrites what would lose its value or hide its form."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.full, torch.full_like) and len(args) > 1 and _is_computed(args[1]):
            return _spread(func, *args, **kwargs)
        if func == _READ_DATA:
            return args[0].detach()  # the same values, as a call that the graph can hold
        if func is torch.Tensor.__getitem__:
            args = (args[0], _without_lists(args[0], args[1]))
        return func(*args, **kwargs)


def _is_computed(value: Any) -> bool:
    return isinstance(value, Tensor) and getattr(value, "constant", None) is None


def _spread(func: Any, like: Any, fill: Tensor, **options: Any) -> Tensor:
    """Return `fill`, which has one element, everywhere; no gradient flows, as through item()."""
    shape = like.shape if isinstance(like, Tensor) else torch.Size(like)
    usual = like.dtype if isinstance(like, Tensor) else fill.dtype
    if usual.is_floating_point and not isinstance(like, Tensor):
        usual = torch.get_default_dtype()
    value = fill.detach().reshape(()).to(options.get("dtype") or usual)
    return value.expand(shape).clone()


def _is_numbers(data: Any) -> bool:
    if isinstance(data, (list, tuple)):
        return bool(data) and all(map(_is_numbers, data))
    return isinstance(data, (bool, int, float))


def _filled(data: Any, options: dict[str, Any]) -> Tensor:
    if isinstance(data, (list, tuple)):
        return torch.stack([_filled(item, options) for item in data])
    return torch.full((), data, **options)


def _without_lists(x: Tensor, index: Any) -> Any:
    """Return `index` with every list of integers as a slice (of one) or a tensor of fills."""
    if not isinstance(index, tuple):
        # torch reads a list of lists as a tuple of lists, one for each dim.
        flat = _is_list(index) and not any(isinstance(entry, (list, tuple)) for entry in index)
        return _picked(x, index, True) if flat else index
    others = (entry for entry in index if not _is_list(entry))
    plain = all(entry is None or isinstance(entry, (slice, type(...))) for entry in others)
    alone = plain and sum(map(_is_list, index)) == 1
    return tuple(_picked(x, entry, alone) if _is_list(entry) else entry for entry in index)


def _is_list(entry: Any) -> bool:
    return isinstance(entry, list) and _is_numbers(entry)


def _picked(x: Tensor, entry: list[Any], alone: bool) -> Any:
    if alone and len(entry) == 1 and type(entry[0]) is int:
        return slice(entry[0], entry[0] + 1 or None)
    return _filled(entry, {"device": x.device})

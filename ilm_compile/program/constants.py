"""Constants that a model makes in its forward, kept in the graph as values and not as tensors.

A program is traced on the meta device, where ``torch.tensor(5.0, device=x.device)`` and the index
list of ``x[:, [-2]]`` would become tensors without data. Here they become fills and slices. A
constant made without a device is made on the CPU and keeps its data: it becomes a buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KeepConstants(TorchFunctionMode):
    """While active, writes constants as ops that carry their value."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None and _is_numbers(args[0]):
            return _filled(args[0], kwargs)
        if func is torch.Tensor.__getitem__:
            args = (args[0], _without_lists(args[0], args[1]))
        return func(*args, **kwargs)


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

"""A model with the first few of its blocks: enough where all others are like one of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ilm_compile.errors import TraceError

_PLAIN = (int, float, str, tuple, list)  # of whose values equal ones are the same
_OF_TORCH = set(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
Settings = dict[tuple[str, str], Any]


@contextmanager
def first_items(model: nn.Module, counts: Mapping[str, int]) -> Iterator[None]:
    """Leave that many first modules of each list of `model`, by its path, until the block ends.

    Raises `TraceError` if one that is left out is unlike all that stay: of other classes, or with
    other settings, its own place in the list aside.
    """
    whole = {path: model.get_submodule(path) for path in counts}
    modules = {path: items._modules for path, items in whole.items()}
    for path, items in whole.items():
        settings = [_settings(item) for item in items.children()]
        stay = [*enumerate(settings[: counts[path]])]
        for place, each in enumerate(settings):
            if not any(_is_alike(each, other, place - at) for at, other in stay):
                raise TraceError(f"trace: {path}.{place} is like none of the first {len(stay)}")
    try:
        for path, items in whole.items():
            items._modules = dict([*modules[path].items()][: counts[path]])
        yield
    finally:
        for path, items in whole.items():
            items._modules = modules[path]


def _settings(block: nn.Module) -> Settings:
    """Return what decides how a block runs, by the module and the name; its weights do not."""
    found: Settings = {}
    for path, module in block.named_modules():
        found[path, ""] = type(module)
        for name, value in vars(module).items():
            if name in _HOOKS:
                found[path, name] = [*value.values()]
            elif isinstance(value, partial):
                found[path, name] = (value.func, value.args, value.keywords)
            elif name not in _OF_TORCH and not isinstance(value, Tensor):
                found[path, name] = value
    return found


def _is_alike(one: Settings, other: Settings, apart: int) -> bool:
    """Whether two blocks that stand so far apart run alike."""
    return one.keys() == other.keys() and all(
        a is b
        or (type(a) is type(b) and isinstance(a, _PLAIN) and a == b)
        or (type(a) is type(b) is int and a - b == apart)
        for a, b in ((one[key], other[key]) for key in one)
    )

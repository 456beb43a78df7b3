"""Python functions that a graph may call beside ops, and what each sends inside."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

from torch import fx

# Of a call: the bytes of each all-reduce in it, forward, and backward if any.
Inside = Callable[[fx.Node], tuple[list[int], ...]]
Function = TypeVar("Function", bound=Callable[..., Any])
FUNCTIONS: dict[Any, Inside | None] = {operator.getitem: None}


def graph_function(inside: Inside | None = None) -> Callable[[Function], Function]:
    """Let graphs call the decorated function. `inside`: what it reduces over its last argument."""

    def register(function: Function) -> Function:
        FUNCTIONS[function] = inside
        return function

    return register

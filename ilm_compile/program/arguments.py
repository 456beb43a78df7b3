"""The arguments of a call by their names in the schema of its op, given by place or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx


def argument(node: fx.Node, name: str) -> Any:
    """Return the argument that the op of a call names so, or its default; None if it has none."""
    return named(node.target, node.args, node.kwargs, name)


def named(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """Return the argument `name` of a call of `target` with these arguments, as `argument`."""
    place = place_of(target, name)
    if place is None:
        return None
    if place < len(args):
        return args[place]
    return kwargs.get(name, target._schema.arguments[place].default_value)


def place_of(target: Any, name: str) -> int | None:
    """Return the place of an argument in the schema of an op; None if it has none of that name."""
    schema = getattr(target, "_schema", None)
    names = [declared.name for declared in schema.arguments] if schema else []
    return names.index(name) if name in names else None

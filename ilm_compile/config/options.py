"""Reads a section of a config into its dataclass: types, ranges, choices, misspelt keys.

A section is a frozen dataclass whose fields are made by `option`; the field's annotation is the
type a value must have. A field that may be None must have None as its default, since TOML cannot
write None: leaving the key out is how it is said.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, Literal, TypeVar

from ilm_compile.config.table import Place, Problems, Table

SectionT = TypeVar("SectionT")
_REQUIRED: Any = object()
WRONG: Any = object()  # in place of a value that a problem was added for


def option(
    default: Any = _REQUIRED,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Collection[Any] | None = None,
) -> Any:
    """A field of a section. low, high: inclusive bounds; above: exclusive; of numbers only."""
    metadata = {"help": help, "low": low, "high": high, "above": above, "choices": choices}
    if default is _REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def read_section(
    section: type[SectionT],
    table: Mapping[str, Any],
    path: str,
    place: Place,
    problems: Problems,
    *,
    known_elsewhere: Collection[str] = (),
) -> SectionT | None:
    """The section that `table` describes, None if something about it is wrong.

    path: of the section, "" for the whole config. known_elsewhere: names to offer beside the
    section's own when a key is misspelt.
    """
    annotations, values, is_right = hints(section), dict[str, Any](), True
    known = {item.name: item for item in fields(section)}  # type: ignore[arg-type]
    places = table.places if isinstance(table, Table) else {}
    for name, value in table.items():
        where = places.get(name, place)
        if name not in known:
            problems.add(where, unknown_key(_join(path, name), [*known, *known_elsewhere], path))
            is_right = False
        elif value is not None:
            read = read_value(
                annotations[name], value, known[name], _join(path, name), where, problems
            )
            is_right &= read is not WRONG
            values[name] = read
    for name, item in known.items():
        if name not in values and item.default is MISSING and item.default_factory is MISSING:
            problems.add(place, f"{_join(path, name)} is missing: {item.metadata.get('help', '')}")
            is_right = False
    return section(**values) if is_right else None


def unknown_key(key: str, known: Collection[str], path: str) -> str:
    """What to say of a key that does not exist."""
    near = difflib.get_close_matches(key.rpartition(".")[2], list(known), n=1, cutoff=0.6)
    if near:
        return f"{key} is not a key; did you mean {_join(path, near[0])}?"
    return f"{key} is not a key; expected one of {', '.join(sorted(set(known)))}"


def read_value(
    hint: Any, value: Any, item: Field[Any], key: str, place: Place, problems: Problems
) -> Any:
    """The value in the type that `hint` asks for; `WRONG` after adding a problem."""
    found = _converted(hint, value)
    if found is WRONG:
        problems.add(place, f"{key}: expected {describe(hint)}, got {shown(value)}")
        return WRONG
    wrong = _range_fault(found, item)
    if wrong:
        problems.add(place, f"{key}: {wrong}, got {shown(value)}")
        return WRONG
    return found


def shown(value: Any) -> str:
    """A value in an error message: its repr, cut short."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "a very large integer"
    if isinstance(value, dict):
        return "a table"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe(hint: Any) -> str:
    """A type as an error message names it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(a) for a in arguments if a is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in arguments)
    if origin is tuple:
        return f"a list, each {describe(arguments[0])}"
    if origin is Mapping:
        return f"a table, each value {describe(arguments[1])}"
    return _NAMES.get(hint, "a table")


_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Any: "a value",
}


def _converted(hint: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        tried = (_converted(a, value) for a in arguments if a is not type(None))
        return next((found for found in tried if found is not WRONG), WRONG)
    if origin is Literal:
        return value if isinstance(value, str) and value in arguments else WRONG
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return WRONG
        items = tuple(_converted(arguments[0], item) for item in value)
        return WRONG if WRONG in items else items
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping):
            return WRONG
        entries = {key: _converted(arguments[1], item) for key, item in value.items()}
        return WRONG if WRONG in entries.values() else entries
    return _scalar(hint, value)


def _scalar(hint: Any, value: Any) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if value.bit_length() < 1000 else math.inf
    return value if type(value) is hint else WRONG


def _range_fault(value: Any, item: Field[Any]) -> str | None:
    limits = item.metadata
    choices = limits.get("choices")
    chosen = value if isinstance(value, tuple) else (value,)
    if choices is not None and any(item not in choices for item in chosen):
        near = difflib.get_close_matches(str(chosen[0]), [str(c) for c in choices], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return f"expected one of {', '.join(map(repr, choices))}{hint}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if not math.isfinite(value):
        return "expected a finite number"
    low, high, above = limits.get("low"), limits.get("high"), limits.get("above")
    if low is not None and value < low:
        return f"expected at least {low:g}"
    if above is not None and value <= above:
        return f"expected more than {above:g}"
    if high is not None and value > high:
        return f"expected at most {high:g}"
    return None


def hints(section: type) -> dict[str, Any]:
    """The annotation of each field, resolved."""
    if section not in _HINTS:
        _HINTS[section] = typing.get_type_hints(section)
    return _HINTS[section]


_HINTS: dict[type, dict[str, Any]] = {}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

"""Plain values as TOML text, the form in which a run keeps its config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def to_toml(values: Mapping[str, Any]) -> str:
    """The text of a TOML file with these values; None is left out."""
    return "\n".join(_lines(values, ())) + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    below = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            below[key] = value
        elif value is not None:
            yield f"{_key(key)} = {toml_value(value)}"
    for key, value in below.items():
        yield ""
        yield f"[{'.'.join(_key(part) for part in (*path, key))}]"
        yield from _lines(value, (*path, key))


def _key(key: str) -> str:
    is_bare = key.isascii() and key.replace("-", "_").isidentifier()
    return key if is_bare else _text(key)


def toml_value(value: Any) -> str:
    """One value as it stands after the =."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_key(k)} = {toml_value(v)}' for k, v in value.items())}}}"
    return repr(value)


def _text(text: str) -> str:
    # JSON's escapes are TOML's too, but TOML forbids the control character DEL and lone surrogates
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

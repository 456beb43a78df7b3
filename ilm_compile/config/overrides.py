"""`--set KEY=VALUE`: keys of the config given on the command line, which win over the file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from typing import Any

from ilm_compile.config.options import hints
from ilm_compile.config.schema import SECTIONS
from ilm_compile.config.table import ConfigError, Place

Override = tuple[str, Any, Place]
_TEXT = (str, str | None)


def read_overrides(given: Iterable[str]) -> list[Override]:
    """Each as (key, value, place). The value is TOML, or text where it is none.

    `none` leaves a key out. A key whose type is text takes any text as it stands. Raises
    `ConfigError` for something other than KEY=VALUE.
    """
    return [_read(text) for text in given]


def _read(text: str) -> Override:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(f"--set {text}: expected KEY=VALUE, as in --set parallel.tensor=4")
    return key, _value(key, value.strip()), Place(f"--set {text}")


def _value(key: str, text: str) -> Any:
    if text.lower() == "none":
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return text
    return text if not isinstance(value, str) and _is_text(key) else value


def _is_text(key: str) -> bool:
    section, _, name = key.partition(".")
    if not name:
        return key == "job_name"
    return section in SECTIONS and hints(SECTIONS[section]).get(name) in _TEXT

"""TOML configs, with the line of every key, which the standard library's reader does not tell."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from typing import Any

from ilm_compile.config.limits import MAX_DOTS, Budget, LimitError
from ilm_compile.config.table import ConfigError, Place, Table

_HEADER = re.compile(r"^\s*\[+\s*([^\]\n]+?)\s*\]+\s*(#.*)?$")
_KEY = re.compile(
    r"""^\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*="""
)
_PART = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")
_QUOTES = re.compile(r'"""|\'\'\'')


def read_toml(text: str, file: str) -> Table:
    """The tables of a TOML file. Raises `ConfigError` naming the line of a syntax error."""
    for number, line in enumerate(text.split("\n"), start=1):
        # the standard library takes quadratic time for a key of many parts
        if line.count(".") > MAX_DOTS:
            raise ConfigError(
                f"{file}:{number}: a line has more than {MAX_DOTS} dots; divide it into several"
            )
    try:
        values = tomllib.loads(text)
        Budget().admit(values)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from None
    except LimitError as error:
        raise ConfigError(f"{file}: {error}") from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{file}: not TOML that can be read: {str(error)[:200]}") from None
    return _with_places(values, key_lines(text), file)


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """The first line on which each key or table header stands, by its path.

    Keys inside inline tables are not found: they stand on the line of the table's own key.
    """
    lines: dict[tuple[str, ...], int] = {}
    prefix: tuple[str, ...] = ()
    in_text = False
    for number, line in enumerate(text.splitlines(), start=1):
        starts_in_text, in_text = in_text, in_text ^ (len(_QUOTES.findall(line)) % 2 == 1)
        if starts_in_text:
            continue
        if header := _HEADER.match(line):
            prefix = _parts(header[1])
            _note(lines, prefix, number)
        elif key := _KEY.match(line):
            _note(lines, (*prefix, *_parts(key[1])), number)
    return lines


def _note(lines: dict[tuple[str, ...], int], path: tuple[str, ...], number: int) -> None:
    """A key and the tables that it makes on its way stand on this line, unless seen before."""
    for length in range(1, len(path) + 1):
        lines.setdefault(path[:length], number)


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(text))


def _with_places(
    values: Mapping[str, Any],
    lines: Mapping[tuple[str, ...], int],
    file: str,
    path: tuple[str, ...] = (),
    above: int | None = None,
) -> Table:
    table = Table()
    for key, value in values.items():
        line = lines.get((*path, key), above)
        if isinstance(value, dict):
            value = _with_places(value, lines, file, (*path, key), line)
        table.put(key, value, Place(file, line))
    return table

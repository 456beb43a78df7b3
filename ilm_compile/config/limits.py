"""What reading a config may cost, so that no file can hang the reader or eat the memory.

A value has a size: 1, and 1 for each item and 1 for each 64 characters of text inside it, an item
counted as often as it is reached. A file that shares one list a thousand times thus pays a thousand
times, as anything that walks the value would.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_FILE_BYTES = 1 << 20
MAX_FILES = 64
MAX_DOTS = 200  # in a line of TOML
MAX_DEPTH = 40  # of nested expressions, and of nested values
MAX_SIZE = 20_000  # of one value
MAX_TEXT = 100_000  # characters
MAX_BITS = 2048  # of an integer
MAX_FORMAT = 100  # digits and width of an f-string field
MAX_WORK = 500_000  # of one config: expressions evaluated and sizes measured

_FORMAT_NUMBERS = re.compile(r"\d+")
CHARACTERS_A_UNIT = 64


class LimitError(Exception):
    """A limit was passed; the message says which."""


@dataclass(slots=True)
class Budget:
    """Work done so far on one config and all that it imports."""

    work: int = 0

    def spend(self, amount: int = 1) -> None:
        """Raise `LimitError` once the config has cost more than `MAX_WORK`."""
        self.work += amount
        if self.work > MAX_WORK:
            raise LimitError(f"evaluating it takes more than {MAX_WORK} steps; write it simpler")

    def admit(self, value: Any) -> Any:
        """The value, if it is one that may be kept: not too large, not too deep, no cycle."""
        size, level = 0, [value]
        for _ in range(MAX_DEPTH):
            below: list[Any] = []
            for item in level:
                size += 1 + _text_size(item)
                below += _items(item)
                if size + len(below) > MAX_SIZE:
                    raise LimitError(f"a value has more than {MAX_SIZE} items")
            if not below:
                self.spend(size)
                return value
            level = below
        raise LimitError(f"a value is nested more than {MAX_DEPTH} deep")


def _items(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | tuple) else []


def _text_size(value: Any) -> int:
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise LimitError(f"a text is longer than {MAX_TEXT} characters")
        return len(value) // CHARACTERS_A_UNIT
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise LimitError(f"an integer needs more than {MAX_BITS} bits")
    return 0


def check_power(base: Any, exponent: Any) -> None:
    """Refuse `base ** exponent` before it is computed if the integer would be too large."""
    if isinstance(base, int) and isinstance(exponent, int) and exponent > 0:
        if abs(base) > 1 and base.bit_length() * exponent > 2 * MAX_BITS:
            raise LimitError(
                f"{_short(base)} ** {_short(exponent)} needs more than {MAX_BITS} bits"
            )


def check_shift(value: Any, places: Any) -> None:
    """Refuse `value << places` before it is computed if the integer would be too large."""
    if isinstance(value, int) and isinstance(places, int) and places > MAX_BITS:
        raise LimitError(f"{_short(value)} << {_short(places)} needs more than {MAX_BITS} bits")


def check_repeat(left: Any, right: Any) -> None:
    """Refuse `left * right` before it is computed if a text or a list would be too large."""
    for repeated, times in ((left, right), (right, left)):
        if isinstance(repeated, str | list | tuple) and isinstance(times, int):
            limit = MAX_TEXT if isinstance(repeated, str) else MAX_SIZE
            if len(repeated) * times > limit:
                kind = "characters" if isinstance(repeated, str) else "items"
                raise LimitError(
                    f"{len(repeated)} {kind} repeated {_short(times)} times: the limit is {limit}"
                )


def check_join(separator: str, parts: Sequence[str]) -> None:
    """Refuse `separator.join(parts)` before it is computed if the text would be too large."""
    size = len(separator) * len(parts) + sum(map(len, parts))
    if size > MAX_TEXT:
        raise LimitError(f"{size} characters joined: the limit is {MAX_TEXT}")


def check_digits(digits: Any) -> None:
    """Refuse to round to a place so far off that its power of ten would be too large."""
    if isinstance(digits, int) and abs(digits) > MAX_FORMAT:
        raise LimitError(f"rounding to {_short(digits)} digits: the limit is {MAX_FORMAT}")


def check_format(spec: str) -> None:
    """Refuse the format spec of an f-string that asks for a long result."""
    for digits in _FORMAT_NUMBERS.findall(spec):
        if len(digits) > 4 or int(digits) > MAX_FORMAT:
            raise LimitError(f"the format {spec[:40]!r} asks for more than {MAX_FORMAT} characters")


def _short(number: int) -> str:
    """The number, or its order where it is long: Python refuses to print very long ones."""
    return str(number) if number.bit_length() <= 64 else f"2**{number.bit_length() - 1}"

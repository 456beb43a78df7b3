"""What a config file is once read: nested tables whose keys know their file and line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ilm_compile.errors import IlmCompileError


class ConfigError(IlmCompileError):
    """A config cannot be used. One line for each problem, each with its file and line."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key was given. file: a path, or "--set" and the like; line: None where it has one."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


class Table(dict[str, Any]):
    """A mapping of a config; `places` says where each key was given."""

    def __init__(self, values: Mapping[str, Any] | None = None, place: Place | None = None) -> None:
        super().__init__(values or {})
        self.places: dict[str, Place] = {}
        if isinstance(values, Table):
            self.places |= values.places
        elif place is not None:
            self.places |= dict.fromkeys(self, place)

    def put(self, key: str, value: Any, place: Place) -> None:
        """Set a key and its place."""
        self[key] = value
        self.places[key] = place

    def find(self, path: str) -> tuple[Any, Place] | None:
        """The value at a dotted path and its place, None where there is none."""
        table: Any = self
        place = UNKNOWN
        for name in path.split("."):
            if not isinstance(table, Table) or name not in table:
                return None
            table, place = table[name], table.places.get(name, place)
        return table, place

    def insert(self, path: str, value: Any, place: Place) -> None:
        """Set the value at a dotted path, with tables on the way as needed."""
        *tables, last = path.split(".")
        table = self
        for name in tables:
            below = table.get(name)
            if not isinstance(below, Table):
                below = Table()
                table.put(name, below, place)
            table = below
        table.put(last, value, place)

    def remove(self, path: str) -> None:
        """Take out the value at a dotted path, if there is one."""
        above, _, last = path.rpartition(".")
        found = self.find(above) if above else (self, UNKNOWN)
        if found is not None and isinstance(found[0], Table):
            found[0].pop(last, None)

    def copy_deep(self) -> Table:
        """A copy whose tables are its own."""
        copy = Table()
        for name, value in self.items():
            own = value.copy_deep() if isinstance(value, Table) else value
            copy.put(name, own, self.places.get(name, UNKNOWN))
        return copy

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, Any, Place]]:
        """Every value that is not a table, with its dotted path and place."""
        for name, value in self.items():
            if isinstance(value, Table):
                yield from value.leaves(f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value, self.places.get(name, UNKNOWN)


UNKNOWN = Place("config")


@dataclass(slots=True)
class Problems:
    """What is wrong with a config, collected so that one error can show all of it."""

    lines: list[str] = field(default_factory=list)

    def add(self, place: Place, message: str) -> None:
        line = f"{place}: {message}"
        if line not in self.lines:
            self.lines.append(line)

    def raise_if_any(self) -> None:
        """Raise `ConfigError` with every problem, a line each."""
        if len(self.lines) == 1:
            raise ConfigError(self.lines[0])
        if self.lines:
            raise ConfigError("\n  ".join([f"{len(self.lines)} problems:", *self.lines]))

"""Rewrites the keys of InternEvo's configs into those of the schema.

`internlm.KEYS` holds what happens to each of theirs; a key that is not in it is left for the schema
to judge. Files of either format may use either set of keys, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ilm_compile.config.options import shown, unknown_key
from ilm_compile.config.table import UNKNOWN, Place, Problems, Table


class Refusal(Exception):
    """A value of theirs that ours cannot honour; the message says what to write instead."""


@dataclass(frozen=True, slots=True)
class To:
    """Becomes our key `path`; `convert` may raise `Refusal`. None always means left out."""

    path: str
    convert: Callable[[Any], Any] | None = None


@dataclass(frozen=True, slots=True)
class Spread:
    """Becomes several keys: `function(value, config)` returns them by path. told: which, if any."""

    function: Callable[[Any, Table], Mapping[str, Any]]
    told: str


@dataclass(frozen=True, slots=True)
class Only:
    """Fine with these values, since they are how it is done here; any other is refused."""

    values: tuple[Any, ...]
    instead: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """Changes no number, so it is left out; noticed unless the value is one of `fulfilled`."""

    why: str
    fulfilled: tuple[Any, ...] = ()


Fate = To | Spread | Only | Ignored


def translate(
    given: Table,
    keys: Mapping[str, Fate],
    sections: Collection[str],
    problems: Problems,
    notices: list[str],
) -> Table:
    """The config in our keys, whose top-level tables are `sections`.

    Adds to `problems` what cannot be done and to `notices` what is ignored.
    """
    translation = _Translation(given, keys, sections, problems, notices, Table())
    translation.take(given, "")
    return translation.result


@dataclass(slots=True)
class _Translation:
    given: Table
    keys: Mapping[str, Fate]
    sections: Collection[str]
    problems: Problems
    notices: list[str]
    result: Table

    def take(self, table: Table, prefix: str) -> None:
        """Translate the keys of one table, all of whose paths start with `prefix`."""
        for name, value in table.items():
            path, place = prefix + name, table.places.get(name, UNKNOWN)
            theirs = self._names_below(path)
            if isinstance(value, Table) and (theirs or path in self.sections):
                self._take_table(value, path, theirs, place)
            elif path in self.keys:
                self._apply(self.keys[path], path, value, place)
            else:
                self._set(path, value, place)

    def _take_table(self, value: Table, path: str, theirs: Sequence[str], place: Place) -> None:
        if path in self.sections:
            if path not in self.result:
                self.result.put(path, Table(), place)
            self.take(value, f"{path}.")
            return
        known = Table()  # the table is theirs alone, so each key must be one of theirs
        for name, item in value.items():
            where = value.places.get(name, place)
            if name in theirs:
                known.put(name, item, where)
            else:
                self.problems.add(where, unknown_key(f"{path}.{name}", theirs, path))
        self.take(known, f"{path}.")

    def _names_below(self, path: str) -> list[str]:
        start = f"{path}."
        below = {key[len(start) :].split(".")[0] for key in self.keys if key.startswith(start)}
        return sorted(below)

    def _apply(self, fate: Fate, path: str, value: Any, place: Place) -> None:
        if value is None:
            return
        try:
            if isinstance(fate, To):
                self._set(fate.path, fate.convert(value) if fate.convert else value, place)
            elif isinstance(fate, Spread):
                for target, item in fate.function(value, self.given).items():
                    self._set(target, item, place)
            elif isinstance(fate, Only):
                if value not in fate.values:
                    raise Refusal(f"{shown(value)} is not supported: {fate.instead}")
            elif value not in fate.fulfilled:
                self.notices.append(f"{place}: {path} has no effect: {fate.why}")
        except Refusal as refusal:
            self.problems.add(place, f"{path}: {refusal}")

    def _set(self, path: str, value: Any, place: Place) -> None:
        if value is None:
            return
        earlier = self.result.find(path)
        if earlier is not None and earlier[0] != value:
            self.problems.add(
                place,
                f"{path} is set to {shown(value)} here and to {shown(earlier[0])} at {earlier[1]}",
            )
            return
        self.result.insert(path, value, place)

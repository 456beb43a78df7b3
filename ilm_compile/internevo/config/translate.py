"""Rewrites the keys of InternEvo's configs into those of the schema.

`keys.KEYS` holds what happens to each of theirs; a key that is not in it is left for the schema
to judge. Files of either format may use either set of keys, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ilm_compile.config.options import shown, unknown_key
from ilm_compile.config.overrides import Override
from ilm_compile.config.table import UNKNOWN, Place, Problems, Table


class Refusal(Exception):
    """A value of theirs that ours cannot honour; the message says what to write instead."""


class NoEffect(Exception):
    """A value of theirs that counts for nothing beside another one; the message says why."""


@dataclass(frozen=True, slots=True)
class To:
    """Becomes our key `path`; `convert` may raise `Refusal`. None always means left out.

    settled_by: keys of ours that say on the command line what a refused value could not.
    """

    path: str
    convert: Callable[[Any], Any] | None = None
    settled_by: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.path, *self.settled_by)


@dataclass(frozen=True, slots=True)
class Spread:
    """Becomes some of `targets`: `function(value, config)` returns them by path.

    It may raise `Refusal` and `NoEffect`. told: what of them, in a page.
    """

    function: Callable[[Any, Table], Mapping[str, Any]]
    told: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Only:
    """Fine with these values, since they are how it is done here; any other is refused.

    targets: keys of ours that `instead` names, which settle it on the command line.
    """

    values: tuple[Any, ...]
    instead: str
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ignored:
    """Changes no number, so it is left out; noticed unless the value is one of `fulfilled`."""

    why: str
    fulfilled: tuple[Any, ...] = ()
    targets: ClassVar[tuple[str, ...]] = ()


Fate = To | Spread | Only | Ignored


def translate(
    keys: Mapping[str, Fate],
    given: Table,
    sections: Collection[str],
    problems: Problems,
    notices: list[str],
    overrides: Sequence[Override] = (),
) -> Table:
    """The config in our keys, whose top-level tables are `sections`.

    Adds to `problems` what cannot be done and to `notices` what is ignored. `overrides` go over
    `given` whichever of two spellings each uses, later ones over earlier ones; a key of the file
    that one of them settles is neither read nor refused.
    """
    whole = given.copy_deep()
    for key, value, place in overrides:
        _put_over(whole, key, value, place, keys)
    translation = _Translation(whole, keys, sections, problems, notices, Table(), {})
    for key, value, place in overrides:
        for path in _set_by(key, value, place, translation):
            translation.settled[path] = place
    translation.take(whole, "")
    return translation.result


def _put_over(table: Table, key: str, value: Any, place: Place, keys: Mapping[str, Fate]) -> None:
    """Put one key of the command line over the file's of the same spelling; None takes it out."""
    earlier = table.find(key)
    size = keys.get(f"{key}.size")
    is_table = earlier is not None and isinstance(earlier[0], Table)
    if is_table and isinstance(size, To | Spread):
        key = f"{key}.size"  # their other way to write the same
    if value is None:
        table.remove(key)
    else:
        table.insert(key, value, place)


def _set_by(key: str, value: Any, place: Place, whole: _Translation) -> list[str]:
    """Our keys that this one of the command line decides, alone."""
    fate = whole.keys.get(key)
    if value is None:
        return [key, *(fate.targets if isinstance(fate, To | Spread) else ())]
    alone = Table()
    alone.insert(key, value, place)
    unseen = _Translation(whole.given, whole.keys, whole.sections, Problems(), [], Table(), {})
    unseen.take(alone, "")
    return [path for path, _, _ in unseen.result.leaves()]


@dataclass(slots=True)
class _Translation:
    given: Table
    keys: Mapping[str, Fate]
    sections: Collection[str]
    problems: Problems
    notices: list[str]
    result: Table
    settled: dict[str, Place]  # our keys that the command line decides, and where

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
                self._notice(place, path, fate.why)
        except NoEffect as reason:
            self._notice(place, path, str(reason))
        except Refusal as refusal:
            if all(self.settled.get(target, place) == place for target in fate.targets):
                self.problems.add(place, f"{path}: {refusal}")

    def _notice(self, place: Place, path: str, why: str) -> None:
        self.notices.append(f"{place}: {path} has no effect: {why}")

    def _set(self, path: str, value: Any, place: Place) -> None:
        if value is None or self.settled.get(path, place) != place:
            return
        earlier = self.result.find(path)
        if earlier is not None and earlier[0] != value:
            self.problems.add(
                place,
                f"{path} is set to {shown(value)} here and to {shown(earlier[0])} at {earlier[1]}",
            )
            return
        self.result.insert(path, value, place)

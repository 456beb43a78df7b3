"""Configs that were written for another program, as this floor needs to know them.

What knows them is on a floor above, which hands in its `Dialect` once, when the package is
imported: nothing here depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ilm_compile.config.config import Config
from ilm_compile.config.overrides import Override
from ilm_compile.config.table import Place, Problems, Table

IsKey = Callable[[str], bool]
Translate = Callable[[Table, Collection[str], Problems, list[str], Sequence[Override]], Table]


@dataclass(frozen=True, slots=True)
class Dialect:
    """keys: with their tables, as ``data.micro_num``; they may stand in any config.

    suffix, read: of its own files, read from a path, in a folder that holds all they import, with
    what tells the names that are keys. translate: into our keys, given our sections; adds problems
    and notices, overrides go over all. fill_defaults: puts in what its files mean by the keys they
    leave out, and returns notices. differences: what is still done otherwise. reference: the part
    of docs/config.md that is about it.
    """

    keys: Collection[str]
    suffix: str
    read: Callable[[Path, Path | None, IsKey], Table]
    translate: Translate
    fill_defaults: Callable[[Table, Place], list[str]]
    differences: Callable[[Config, Place], Iterable[str]]
    reference: Callable[[], Iterator[str]]

    def names(self, section: str) -> list[str]:
        """Return the keys of one of our sections, without its name."""
        start = f"{section}."
        return [key.removeprefix(start) for key in self.keys if key.startswith(start)]

    @property
    def top(self) -> set[str]:
        """The names at the top of a config."""
        return {key.split(".")[0] for key in self.keys}


_KNOWN: list[Dialect] = []


def learn(dialect: Dialect) -> None:
    """Let configs be written in `dialect`, in place of any other beside our own."""
    _KNOWN[:] = [dialect]


def known() -> Dialect:
    """Return the dialect that was learnt."""
    return _KNOWN[0]

"""A config from a file or from a mapping: read, translated, overridden, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ilm_compile.config.checks import check_together
from ilm_compile.config.config import Config
from ilm_compile.config.dialect import Dialect, known
from ilm_compile.config.files import read_source
from ilm_compile.config.model_section import read_model
from ilm_compile.config.options import read_section, shown, unknown_key
from ilm_compile.config.overrides import Override, read_overrides
from ilm_compile.config.schema import SECTIONS
from ilm_compile.config.table import UNKNOWN, ConfigError, Place, Problems, Table
from ilm_compile.config.toml_file import read_toml

ALL_SECTIONS = ("model", *SECTIONS)
_TOP_KEYS = ("job_name", *ALL_SECTIONS)
_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, root: str | Path | None = None
) -> Config:
    """The config in a TOML file or in a Python-style file of InternEvo; no code is run.

    overrides: "KEY=VALUE" each, which win over the file. root: the folder that a Python-style file
    may import other configs from, its own when None. Raises `ConfigError` with everything that is
    wrong, each on a line with file and line number.
    """
    path, theirs = Path(path), known()
    if path.suffix == ".toml":
        return _resolved(
            read_toml(read_source(path), str(path)), read_overrides(overrides), Place(str(path))
        )
    if path.suffix != theirs.suffix:
        raise ConfigError(f"{path}: expected a config in a .toml or {theirs.suffix} file")
    table = theirs.read(path, None if root is None else Path(root), _is_key)
    return _resolved(table, read_overrides(overrides), Place(str(path)), is_theirs=True)


def make_config(
    values: Mapping[str, Any], overrides: Iterable[str] = (), *, is_theirs: bool = False
) -> Config:
    """The config in a mapping, with the keys that a file would have.

    is_theirs: what it leaves out is as in InternEvo, which holds of every Python-style file.
    """
    table = _as_table(values, UNKNOWN)
    return _resolved(table, read_overrides(overrides), UNKNOWN, is_theirs=is_theirs)


def _is_key(name: str) -> bool:
    return name in _TOP_KEYS or name in known().top


def _as_table(values: Mapping[str, Any], place: Place) -> Table:
    table = Table()
    for key, value in values.items():
        table.put(key, _as_table(value, place) if isinstance(value, Mapping) else value, place)
    return table


def _resolved(
    given: Table, overrides: list[Override], place: Place, *, is_theirs: bool = False
) -> Config:
    theirs, problems, notices = known(), Problems(), list[str]()
    table = theirs.translate(given, ALL_SECTIONS, problems, notices, overrides)
    if is_theirs:
        notices += theirs.fill_defaults(table, place)
    _check_top_level(table, theirs, problems)
    values: dict[str, Any] = {}
    for name in ALL_SECTIONS:
        section, where = _section(table, name, place, problems)
        if name == "model":
            values[name] = read_model(section, where, problems)
        else:
            values[name] = read_section(
                SECTIONS[name], section, name, where, problems, known_elsewhere=theirs.names(name)
            )
    if "job_name" in table:
        values["job_name"] = _job_name(table["job_name"], table.places["job_name"], problems)
    problems.raise_if_any()
    config = Config(**values)
    if is_theirs:
        notices += theirs.differences(config, place)
    return check_together(replace(config, notices=tuple(notices)), table, place)


def _check_top_level(table: Table, theirs: Dialect, problems: Problems) -> None:
    for name in table:
        if name not in _TOP_KEYS:
            message = unknown_key(name, [*_TOP_KEYS, *sorted(theirs.top)], "")
            problems.add(
                table.places[name], f"{message}; a name for use in the file only is in capitals"
            )


def _section(
    table: Table, name: str, place: Place, problems: Problems
) -> tuple[Mapping[str, Any], Place]:
    value, where = table.get(name), table.places.get(name, place)
    if value is not None and not isinstance(value, Mapping):
        problems.add(where, f"{name}: expected a table, got {shown(value)}")
    return (value if isinstance(value, Mapping) else Table()), where


def _job_name(value: Any, place: Place, problems: Problems) -> str:
    """It names a folder, so it must be one plain name."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        problems.add(
            place,
            f"job_name: expected letters, digits, '.', '_' and '-', since it names a folder; got "
            f"{shown(value)}",
        )
    return str(value)[:100]

"""A config from a file or from a mapping: read, translated, overridden, checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ilm_compile.config import internlm
from ilm_compile.config.checks import check_together
from ilm_compile.config.config import Config
from ilm_compile.config.files import read_source
from ilm_compile.config.internlm_defaults import differences, fill_defaults
from ilm_compile.config.model_section import read_model
from ilm_compile.config.options import read_section, shown, unknown_key
from ilm_compile.config.overrides import Override, read_overrides
from ilm_compile.config.python_file import Reader
from ilm_compile.config.schema import SECTIONS
from ilm_compile.config.table import UNKNOWN, ConfigError, Place, Problems, Table
from ilm_compile.config.toml_file import read_toml
from ilm_compile.config.translate import translate

ALL_SECTIONS = ("model", *SECTIONS)
_TOP_KEYS = ("job_name", *ALL_SECTIONS)
_TOP_OF_THEIRS = {key.split(".")[0] for key in internlm.KEYS}
_THEIRS = {
    name: [key.removeprefix(f"{name}.") for key in internlm.KEYS if key.startswith(f"{name}.")]
    for name in ALL_SECTIONS
}
_NAME = re.compile(r"\w[\w.-]{0,99}", re.ASCII)


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, root: str | Path | None = None
) -> Config:
    """The config in a TOML file or in a Python-style file of InternEvo; no code is run.

    overrides: "KEY=VALUE" each, which win over the file. root: the folder that a Python-style file
    may import other configs from, its own when None. Raises `ConfigError` with everything that is
    wrong, each on a line with file and line number.
    """
    path = Path(path)
    if path.suffix not in _READERS:
        raise ConfigError(f"{path}: expected a config in a .toml or .py file")
    table = _READERS[path.suffix](path, None if root is None else Path(root))
    return _resolved(
        table, read_overrides(overrides), Place(str(path)), is_theirs=path.suffix == ".py"
    )


def make_config(
    values: Mapping[str, Any], overrides: Iterable[str] = (), *, is_theirs: bool = False
) -> Config:
    """The config in a mapping, with the keys that a file would have.

    is_theirs: what it leaves out is as in InternEvo, which holds of every Python-style file.
    """
    table = _as_table(values, UNKNOWN)
    return _resolved(table, read_overrides(overrides), UNKNOWN, is_theirs=is_theirs)


def _read_toml_file(path: Path, root: Path | None) -> Table:
    return read_toml(read_source(path), str(path))


def _read_python_file(path: Path, root: Path | None) -> Table:
    resolved = _resolve(path)
    reader = Reader(root=_resolve(root) if root is not None else resolved.parent)
    names = reader.read(resolved)
    kept = Table()
    for name, value in names.items():
        if _is_key(name) or not (name.isupper() or name.startswith("_") or name in reader.used):
            kept.put(name, value, names.places[name])
    return kept


def _resolve(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{str(path)!r}: not a path: {error}") from None


_READERS: dict[str, Callable[[Path, Path | None], Table]] = {
    ".toml": _read_toml_file,
    ".py": _read_python_file,
}


def _is_key(name: str) -> bool:
    return name in _TOP_KEYS or name in _TOP_OF_THEIRS


def _as_table(values: Mapping[str, Any], place: Place) -> Table:
    table = Table()
    for key, value in values.items():
        table.put(key, _as_table(value, place) if isinstance(value, Mapping) else value, place)
    return table


def _resolved(
    given: Table, overrides: list[Override], place: Place, *, is_theirs: bool = False
) -> Config:
    problems, notices = Problems(), list[str]()
    table = translate(given, internlm.KEYS, ALL_SECTIONS, problems, notices, overrides)
    if is_theirs:
        notices += fill_defaults(table, place)
    _check_top_level(table, problems)
    values: dict[str, Any] = {}
    for name in ALL_SECTIONS:
        section, where = _section(table, name, place, problems)
        if name == "model":
            values[name] = read_model(section, where, problems)
        else:
            values[name] = read_section(
                SECTIONS[name], section, name, where, problems, known_elsewhere=_THEIRS[name]
            )
    if "job_name" in table:
        values["job_name"] = _job_name(table["job_name"], table.places["job_name"], problems)
    problems.raise_if_any()
    config = Config(**values)
    if is_theirs:
        notices += differences(config, place)
    return check_together(replace(config, notices=tuple(notices)), table, place)


def _check_top_level(table: Table, problems: Problems) -> None:
    for name in table:
        if name not in _TOP_KEYS:
            message = unknown_key(name, [*_TOP_KEYS, *sorted(_TOP_OF_THEIRS)], "")
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

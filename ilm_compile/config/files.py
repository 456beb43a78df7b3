"""Config files on disk: found inside one folder tree, of limited size, and nothing but files."""

from __future__ import annotations

import stat
from pathlib import Path

from ilm_compile.config.limits import MAX_FILE_BYTES
from ilm_compile.config.table import ConfigError


def read_source(path: Path) -> str:
    """The text of a config file. Raises `ConfigError` for anything but a small UTF-8 file."""
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):
            raise ConfigError(f"{path}: expected a config file, got something else (a folder?)")
        if state.st_size > MAX_FILE_BYTES:
            raise ConfigError(
                f"{path}: expected a config of at most {MAX_FILE_BYTES} bytes, got {state.st_size}"
            )
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} at offset "
            f"{error.start}"
        ) from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{str(path)!r}: not a path: {error}") from error


def inside(root: Path, path: Path) -> Path | None:
    """The path with its links resolved, or None if that lies outside `root`."""
    try:
        resolved = path.resolve()
        return resolved if resolved.is_relative_to(root.resolve()) else None
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a loop of links
        return None


def display(path: Path) -> str:
    """The path as messages show it: from the current folder where it lies below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)

"""Where documents come from: files of plain text, and the reference of the interpreter itself."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterable
from pathlib import Path

from ilm_compile.errors import IlmCompileError


def documents_from_pydoc() -> list[str]:
    """The Python language reference that comes with every interpreter, a document per topic."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def documents_from_files(paths: Iterable[str | Path]) -> list[str]:
    """The text of each file, in the given order. Errors: a path that is not a UTF-8 text file."""
    return [_read_text(Path(path)) for path in paths]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise IlmCompileError(
            f"documents_from_files: expected a readable text file at {path}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise IlmCompileError(
            f"documents_from_files: expected UTF-8 text in {path}, got byte "
            f"{error.object[error.start]:#04x} at offset {error.start}; convert it to UTF-8"
        ) from error

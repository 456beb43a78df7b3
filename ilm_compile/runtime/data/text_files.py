"""Files of text as a stream of documents: plain text, or JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.documents import documents_from_files

JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, slots=True)
class Document:
    """text: what to encode; num_bytes: what it took of its file; source: file, or file:line."""

    text: str
    num_bytes: int
    source: str


def read_documents(paths: Sequence[Path], *, field: str = "text") -> Iterator[Document]:
    """Every document of the files, in order; no file is held in memory but a plain one.

    A file of JSON Lines (`JSON_LINES`) has a document per line, an object with the string `field`;
    lines without anything are passed over. Any other file is one document of UTF-8 text. Raises
    `IlmCompileError` naming file and line for what is not so.
    """
    for path in paths:
        reader: Callable[[Path, str], Iterator[Document]] = (
            _json_lines if path.suffix in JSON_LINES else _plain
        )
        yield from reader(path, field)


def _plain(path: Path, field: str) -> Iterator[Document]:
    (text,) = documents_from_files([path])
    yield Document(text, path.stat().st_size, str(path))


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise IlmCompileError(
            f"prepare-data: expected a readable file at {path}: {error.strerror}"
        ) from error
    with file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                source = f"{path}:{number}"
                yield Document(_text_of(line, field, source), len(line), source)


def _text_of(line: bytes, field: str, source: str) -> str:
    expected = f"an object with the string {field!r}"
    try:
        value: Any = json.loads(line.decode("utf-8"))
    except RecursionError as error:
        raise _wrong(source, expected, "JSON nested too deeply") from error
    except ValueError as error:
        raise _wrong(source, expected, str(error)) from error
    if not isinstance(value, dict):
        raise _wrong(source, expected, f"a {type(value).__name__}")
    text = value.get(field)
    if not isinstance(text, str):
        found = ", ".join(f"{key!r} ({type(value[key]).__name__})" for key in list(value)[:10])
        raise _wrong(source, expected, f"the fields {found}; choose one with --field")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _wrong(source, "text that UTF-8 can write", str(error)) from error
    return text


def _wrong(source: str, expected: str, got: str) -> IlmCompileError:
    return IlmCompileError(f"prepare-data: expected {expected} in {source}, got {got}")

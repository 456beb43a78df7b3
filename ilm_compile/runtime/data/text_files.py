"""Files as a stream of documents: plain text, JSON Lines, or one JSON value."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.chat import PLAIN, Chat, Message
from ilm_compile.runtime.data.json_records import (
    FORMS,
    WrongRecord,
    is_record,
    messages_of,
    text_of,
)

JSON_LINES = (".jsonl", ".ndjson")
JSON = (*JSON_LINES, ".json")


@dataclass(frozen=True, slots=True)
class Document:
    """text: what to encode; num_bytes: what it took of its file; source: file, or file:line."""

    text: str
    num_bytes: int
    source: str


def read_documents(
    paths: Sequence[Path],
    *,
    field: str | None = None,
    chat: Chat = PLAIN,
    as_text: bool = False,
    option: str = "field=",
) -> Iterator[Document]:
    """Every document of the files, in order.

    A file named as JSON (`JSON`) has a document per line or, if it is one JSON value, per object of
    the list: what `text_of` makes of it, conversations rendered by `chat`. field: where the text
    is. Only JSON Lines are not held in memory whole. Any other file is one document of UTF-8 text,
    and refused if it holds JSON objects. as_text: every file is text, JSON too. option: what the
    caller's user writes to give `field`, for errors. Raises `IlmCompileError` naming file and line.
    """
    for path in paths:
        if as_text or path.suffix not in JSON:
            yield _plain(path, as_text=as_text)
        else:
            for value, num_bytes, source in _records(path):
                yield Document(_text(value, field, chat, source, option), num_bytes, source)


def read_conversations(paths: Sequence[Path]) -> Iterator[tuple[list[Message], str]]:
    """Every conversation of the JSON files, in order, and where it is: file:line, or file[index].

    Raises `IlmCompileError` naming the place of what is none.
    """
    for path in paths:
        for value, _, source in _records(path):
            try:
                yield messages_of(value), source
            except WrongRecord as error:
                raise _wrong(source, error.expected, error.got) from error


def _plain(path: Path, *, as_text: bool) -> Document:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except OSError as error:
        raise IlmCompileError(
            f"documents: expected a readable text file at {path}: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise IlmCompileError(
            f"documents: expected UTF-8 text in {path}, got byte "
            f"{error.object[error.start]:#04x} at offset {error.start}; convert it to UTF-8"
        ) from error
    if not as_text and _holds_records(text):
        raise IlmCompileError(
            f"documents: expected text in {path}, got JSON, whose quotes and field names would be "
            f"learnt; name it .json or .jsonl, each object {FORMS}, or learn it as it is with "
            "prepare-data --as-text"
        )
    return Document(text, len(data), str(path))


def _holds_records(text: str) -> bool:
    start = text.lstrip("\ufeff \t\r\n")
    if start[:1] not in ("{", "["):
        return False
    for candidate in (start.partition("\n")[0], start):
        with suppress(ValueError, RecursionError):
            return is_record(json.loads(candidate))
    return False


def _records(path: Path) -> Iterator[tuple[Any, int, str]]:
    """The JSON values of a file, the bytes that each took, and its place."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise IlmCompileError(
            f"documents: expected a readable file at {path}: {error.strerror}"
        ) from error
    with file:
        if path.suffix not in JSON_LINES and not _is_lines(file):
            yield from _one_value(path, file.read())
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                source = f"{path}:{number}"
                yield _parse(line, source), len(line), source


def _is_lines(file: Any) -> bool:
    """Whether the first line that holds anything is an object by itself; rewinds."""
    first = next((line for line in file if line.strip()), b"")
    file.seek(0)
    try:
        return isinstance(_parse(first, ""), dict)
    except IlmCompileError:
        return False


def _one_value(path: Path, data: bytes) -> Iterator[tuple[Any, int, str]]:
    """The objects of a list, or the only one."""
    value = _parse(data, str(path))
    records = value if isinstance(value, list) else [value]
    for index, record in enumerate(records):
        source = f"{path}[{index}]" if isinstance(value, list) else str(path)
        yield record, len(data) // len(records), source


def _parse(data: bytes, source: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise _wrong(source, "JSON", "JSON nested too deeply") from error
    except ValueError as error:
        raise _wrong(source, f"JSON, {FORMS}", str(error)) from error


def _text(value: Any, field: str | None, chat: Chat, source: str, option: str) -> str:
    try:
        text = text_of(value, field, chat)
    except WrongRecord as error:
        way = f"; choose one with {option}" if error.by_field else ""
        raise _wrong(source, error.expected, error.got + way) from error
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _wrong(source, "text that UTF-8 can write", str(error)) from error
    return text


def _wrong(source: str, expected: str, got: str) -> IlmCompileError:
    return IlmCompileError(f"documents: expected {expected} in {source}, got {got}")

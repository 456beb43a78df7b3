"""Where documents come from: files, and the reference of the interpreter itself."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterable
from pathlib import Path

from ilm_compile.runtime.data.chat import PLAIN, Chat
from ilm_compile.runtime.data.text_files import read_documents


def documents_from_pydoc() -> list[str]:
    """The Python language reference that comes with every interpreter, a document per topic."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def documents_from_files(
    paths: Iterable[str | Path],
    *,
    field: str | None = None,
    chat: Chat = PLAIN,
    option: str = "field=",
) -> list[str]:
    """The texts of the files in the given order, one of a text file and all of a JSON one.

    Errors and keywords are those of `read_documents`.
    """
    files = [Path(path) for path in paths]
    found = read_documents(files, field=field, chat=chat, option=option)
    return [document.text for document in found]

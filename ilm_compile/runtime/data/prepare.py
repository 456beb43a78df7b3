"""Documents to a folder of token files, all of it or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data.shard_folder import SUFFIX, open_shards, summarize
from ilm_compile.runtime.data.shard_writer import ShardWriter
from ilm_compile.runtime.data.text_files import Document
from ilm_compile.runtime.data.tokenizer import Tokenizer

SHARD_TOKENS = 100_000_000


@dataclass(slots=True)
class Summary:
    """What was written so far. text_bytes: of the texts in UTF-8."""

    shards: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0


def prepare(
    documents: Iterable[Document],
    folder: str | Path,
    *,
    tokenizer: Tokenizer,
    prefix: tuple[int, ...] = (),
    shard_tokens: int = SHARD_TOKENS,
    report: Callable[[Document, Summary], None] | None = None,
) -> Summary:
    """Write ``00000.bin``, ``00001.bin``, ... of the encoded documents into a new `folder`.

    Each document is `prefix`, its tokens and the end-of-document token; what a chat template has
    put there already is not put there twice. A file is closed once it has `shard_tokens`. report:
    called after every document. The folder has another, hidden name until it is complete, and none
    is left after an error. Raises `IlmCompileError` if `folder` exists and is not empty, or there
    is no document.
    """
    target = Path(folder)
    if shard_tokens < 1:
        raise IlmCompileError(
            f"prepare-data: expected at least 1 token in a file, got shard_tokens={shard_tokens}"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise IlmCompileError(
            f"prepare-data: {target} exists; remove it, or write to another folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        summary = _write(documents, hidden, tokenizer, prefix, shard_tokens, report)
        if not summary.documents:
            raise IlmCompileError("prepare-data: expected at least one document, got none")
        summarize(hidden, open_shards(hidden), is_final=True)
        hidden.chmod(0o777 & ~_umask())
        os.rename(hidden, target)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return summary


def _write(
    documents: Iterable[Document],
    folder: Path,
    tokenizer: Tokenizer,
    prefix: tuple[int, ...],
    shard_tokens: int,
    report: Callable[[Document, Summary], None] | None,
) -> Summary:
    summary = Summary()
    with ExitStack() as stack:
        writer: ShardWriter | None = None
        for document in documents:
            if writer is None or writer.num_tokens >= shard_tokens:
                stack.pop_all().close()
                writer = stack.enter_context(ShardWriter(folder / f"{summary.shards:05d}{SUFFIX}"))
                summary.shards += 1
            tokens = tokenizer.encode(document.text)
            if tuple(tokens[: len(prefix)]) != prefix:
                tokens = [*prefix, *tokens]
            if tokens[-1:] != [tokenizer.end_of_document]:
                tokens = [*tokens, tokenizer.end_of_document]
            writer.add(tokens)
            summary.documents += 1
            summary.tokens += len(tokens)
            summary.text_bytes += len(document.text.encode("utf-8"))
            if report is not None:
                report(document, summary)
    return summary


def _umask() -> int:
    """mkdtemp makes a folder for its owner alone; the result is to be as any other folder."""
    current = os.umask(0)
    os.umask(current)
    return current

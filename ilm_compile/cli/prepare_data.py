"""Encode text files as token files, for ilm-compile train.

Files that end in .jsonl hold a document per line, {"text": ...}; any other file is one document.
The output is a folder of InternLM's token files, x.bin and x.bin.meta; give the types of a training
set a sub-folder each:
  ilm-compile prepare-data books.jsonl --tokenizer tokenizer.json --out data/en
  ilm-compile prepare-data src/*.py --tokenizer tokenizer.json --out data/code
With --out FILE.safetensors it is one file of rows of byte tokens instead, for a small try.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ilm_compile.cli.files import SUFFIX, write_text
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime import ByteTokenizer, documents_from_files, pack_documents
from ilm_compile.runtime.data import FileTokenizer, load_tokenizer, prepare, read_documents
from ilm_compile.runtime.data.prepare import SHARD_TOKENS, Summary
from ilm_compile.runtime.data.text_files import Document
from ilm_compile.runtime.data.tokenizer import BYTES

SEQ_LEN = 1024
MAX_DOCUMENTS = 8

Report = Callable[[Document, Summary], None]

# Options of one form of output, with their defaults; None from the parser: it was not given.
_OF_TOKEN_FILES = {
    "tokenizer": BYTES,
    "field": "text",
    "begin_of_document": None,
    "end_of_document": None,
    "shard_tokens": SHARD_TOKENS,
}
_OF_ROWS = {"seq_len": SEQ_LEN, "max_documents": MAX_DOCUMENTS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="UTF-8 text or .jsonl")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new folder, or FILE.safetensors"
    )
    tokens = parser.add_argument_group("token files")
    tokens.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer.json of Hugging Face, SentencePiece .model, or bytes (the default)",
    )
    tokens.add_argument("--field", metavar="NAME", help="of each line of a .jsonl; default text")
    tokens.add_argument(
        "--begin-of-document", metavar="PIECE", help="put before each document, such as <s>"
    )
    tokens.add_argument(
        "--end-of-document", metavar="PIECE", help="put after each; default </s> or its like"
    )
    tokens.add_argument(
        "--shard-tokens", type=int, metavar="N", help=f"of one file; default {SHARD_TOKENS}"
    )
    rows = parser.add_argument_group("FILE.safetensors")
    rows.add_argument("--seq-len", type=int, metavar="N", help=f"of a row; default {SEQ_LEN}")
    rows.add_argument(
        "--max-documents", type=int, metavar="N", help=f"in one row; default {MAX_DOCUMENTS}"
    )


def run(options: argparse.Namespace) -> None:
    """Encode and write."""
    is_rows = options.out.suffix == SUFFIX
    own, other = (_OF_ROWS, _OF_TOKEN_FILES) if is_rows else (_OF_TOKEN_FILES, _OF_ROWS)
    for name in other:
        if getattr(options, name) is not None:
            raise IlmCompileError(
                f"prepare-data: --{name.replace('_', '-')} does nothing for --out {options.out}: "
                f"it is for {'a folder' if is_rows else f'a {SUFFIX} file'} as --out"
            )
    for name, default in own.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    if options.out.is_file():
        raise IlmCompileError(f"prepare-data: {options.out} exists; remove it, or choose another")
    (_write_rows if is_rows else _write_token_files)(options)


def _write_token_files(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(options.tokenizer, end=options.end_of_document)
    prefix: tuple[int, ...] = ()
    if options.begin_of_document is not None:
        if not isinstance(tokenizer, FileTokenizer):
            raise IlmCompileError("prepare-data: --begin-of-document needs a --tokenizer file")
        prefix = (tokenizer.token_id(options.begin_of_document),)
    with _progress(options.files) as report:
        summary = prepare(
            read_documents(options.files, field=options.field),
            options.out,
            tokenizer=tokenizer,
            prefix=prefix,
            shard_tokens=options.shard_tokens,
            report=report,
        )
    print(
        f"wrote {summary.documents:,} documents, {summary.tokens:,} tokens below "
        f"{tokenizer.vocab_size:,} ({summary.text_bytes / summary.tokens:.2f} bytes of text each), "
        f"in {summary.shards} files to {options.out}"
    )


def _write_rows(options: argparse.Namespace) -> None:
    text = pack_documents(
        documents_from_files(options.files),
        seq_len=options.seq_len,
        max_documents=options.max_documents,
    )
    write_text(text, options.out)
    padding = (text.input_ids == ByteTokenizer.padding).double().mean().item()
    print(
        f"wrote {len(text)} rows of {options.seq_len} tokens, {padding:.1%} of them padding, "
        f"to {options.out}"
    )


@contextmanager
def _progress(files: list[Path]) -> Iterator[Report]:
    """A bar on a terminal, nothing elsewhere."""
    total = sum(path.stat().st_size for path in files if path.is_file())
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=total)

        def report(document: Document, summary: Summary) -> None:
            text = f"{summary.documents:,} documents, {summary.tokens:,} tokens"
            bar.update(task, advance=document.num_bytes, description=text)

        yield report

"""Encode text files as token files, for ilm-compile train.

Files that end in .json or .jsonl hold objects, a list or one per line, each a document:
  {"text": "..."}                                                   a text
  {"messages": [{"role": "user", "content": "..."}, ...]}           a conversation
  {"conversations": [{"from": "human", "value": "..."}, ...]}       a conversation (ShareGPT)
  {"instruction": "...", "input": "...", "output": "..."}           a question and answer (Alpaca)
Conversations become text by the chat template beside the tokenizer.json, or with a heading for each
message (### User:). Every token is learnt, those of the user too. Any other file is one document.
The output is a folder of InternLM's token files, x.bin and x.bin.meta; give the types of a training
set a sub-folder each:
  ilm-compile prepare-data books.jsonl --tokenizer tokenizer.json --out data/en
  ilm-compile prepare-data src/*.py --tokenizer tokenizer.json --out data/code
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.data import (
    FileTokenizer,
    chat_of,
    load_tokenizer,
    prepare,
    read_documents,
)
from ilm_compile.runtime.data.chat import Message
from ilm_compile.runtime.data.prepare import SHARD_TOKENS, Summary
from ilm_compile.runtime.data.text_files import Document
from ilm_compile.runtime.data.tokenizer import BYTES

Report = Callable[[Document, Summary], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="UTF-8 text, .json or .jsonl"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="new folder of token files"
    )
    parser.add_argument(
        "--tokenizer",
        default=BYTES,
        metavar="FILE",
        help="tokenizer.json of Hugging Face, SentencePiece .model, or bytes (the default)",
    )
    parser.add_argument(
        "--field", metavar="NAME", help="that holds the text or the messages of a JSON object"
    )
    parser.add_argument(
        "--as-text", action="store_true", help="learn JSON files as they are, quotes and all"
    )
    parser.add_argument(
        "--begin-of-document", metavar="PIECE", help="put before each document, such as <s>"
    )
    parser.add_argument(
        "--end-of-document", metavar="PIECE", help="put after each; default </s> or its like"
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="N",
        help=f"of one file; default {SHARD_TOKENS}",
    )


def run(options: argparse.Namespace) -> None:
    """Encode and write."""
    tokenizer = load_tokenizer(options.tokenizer, end=options.end_of_document)
    prefix: tuple[int, ...] = ()
    if options.begin_of_document is not None:
        if not isinstance(tokenizer, FileTokenizer):
            raise IlmCompileError("prepare-data: --begin-of-document needs a --tokenizer file")
        prefix = (tokenizer.token_id(options.begin_of_document),)
    if options.as_text and options.field is not None:
        raise IlmCompileError("prepare-data: a text has no fields; leave --field or --as-text out")
    chat, num_rendered = chat_of(options.tokenizer), 0

    def render(messages: list[Message]) -> str:
        nonlocal num_rendered
        num_rendered += 1
        return chat.render(messages)

    with _progress(options.files) as report:
        summary = prepare(
            read_documents(
                options.files,
                field=options.field,
                chat=replace(chat, render=render),
                as_text=options.as_text,
                option="--field",
            ),
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
    if num_rendered:
        print(f"{num_rendered:,} of them are conversations, rendered by {chat.name}")


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

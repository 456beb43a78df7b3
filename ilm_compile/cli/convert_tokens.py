"""The special tokens that a converted model's config names: those of the data it was trained on."""

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from ilm_compile.cli.model import is_config
from ilm_compile.config import load_config
from ilm_compile.convert.hf_config import SpecialTokens
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.checkpoint.slices import read_manifest
from ilm_compile.runtime.checkpoint.storage import MANIFEST, open_storage
from ilm_compile.runtime.data import FileTokenizer, load_tokenizer
from ilm_compile.runtime.data.tokenizer import BYTES


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, which are those of prepare-data."""
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="of the data, for the special tokens in the config.json of --to hf-llama: bytes, "
        "tokenizer.json or a SentencePiece .model; else by the config of the run",
    )
    parser.add_argument(
        "--begin-of-document", metavar="PIECE", help="that data had before each document"
    )
    parser.add_argument("--end-of-document", metavar="PIECE", help="and after it")


def find_tokens(options: argparse.Namespace) -> SpecialTokens:
    """Those of --tokenizer, else of the data of the run, else none, which is told."""
    name = options.tokenizer or _of_run(options)
    if name is None:
        print(
            "ilm-compile: note: config.json names no tokens that begin and end a text, for those "
            "of the data are not known here; --tokenizer says them",
            file=sys.stderr,
        )
        return SpecialTokens()
    tokenizer = load_tokenizer(name, end=options.end_of_document)
    begin = None
    if options.begin_of_document is not None:
        if not isinstance(tokenizer, FileTokenizer):
            raise IlmCompileError("convert: --begin-of-document needs a --tokenizer file")
        begin = tokenizer.token_id(options.begin_of_document)
    return SpecialTokens(begin, tokenizer.end_of_document, tokenizer.padding)


def _of_run(options: argparse.Namespace) -> str | None:
    """The tokenizer in the config that the checkpoint was made with, or in MODEL's."""
    data: Mapping[str, Any] = {}
    path = options.input.absolute()
    if (path / MANIFEST).is_file():
        data = read_manifest(open_storage(path.parent), path.name).config.get("data", {})
    elif is_config(options.model):
        data = load_config(options.model).to_dict()["data"]
    by_type = {"pydoc": BYTES, "text": data.get("tokenizer")}
    return by_type.get(data.get("type", ""))

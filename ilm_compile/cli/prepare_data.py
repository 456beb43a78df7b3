"""Pack text files into rows of byte tokens, for ilm-compile train.

Each file is a document. Attention and positions never cross from one to the next.
"""

import argparse
from pathlib import Path

from ilm_compile.cli.files import write_text
from ilm_compile.runtime import ByteTokenizer, documents_from_files, pack_documents

SEQ_LEN = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="UTF-8 text")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors")
    parser.add_argument(
        "--seq-len", type=int, default=SEQ_LEN, metavar="N", help=f"tokens a row; default {SEQ_LEN}"
    )
    parser.add_argument(
        "--max-documents", type=int, default=8, metavar="N", help="in one row; default 8"
    )


def run(options: argparse.Namespace) -> None:
    """Pack and write."""
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

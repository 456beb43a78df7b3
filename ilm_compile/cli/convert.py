"""Rewrite the weights of a model in the names and layout of another format.

Formats: ilm (our own, a folder of a checkpoint too), hf-llama (transformers' LlamaForCausalLM),
hf-internlm2 (InternLM2 on the Hugging Face hub), hf (to read, either; to write, the folder of a
config's model.hf, whose tokenizer goes with it), internlm (InternLM's own model_tp0_pp0.pt and so
on). Tensors are read and written in pieces, so memory does not grow with the model.
"""

import argparse
from pathlib import Path

import torch

from ilm_compile.cli.convert_tokens import add_token_arguments, find_tokens
from ilm_compile.cli.model import add_model_argument, load_model
from ilm_compile.convert import FORMATS, open_weights, write_model
from ilm_compile.convert.formats import check_formats
from ilm_compile.convert.hf_config import hf_llama_config
from ilm_compile.convert.write import DEFAULT_SHARD_BYTES
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.checkpoint.storage import MANIFEST

DTYPES = ("float32", "bfloat16", "float16")
WRITTEN = [name for name, form in FORMATS.items() if form.is_written]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_argument(parser)
    parser.add_argument("input", type=Path, metavar="INPUT", help="file or folder of weights")
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="a .safetensors file, or a new folder"
    )
    parser.add_argument("--from", dest="source", choices=FORMATS, required=True)
    parser.add_argument("--to", dest="target", choices=WRITTEN, required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="of the output; else as the input")
    parser.add_argument(
        "--shard-gb",
        type=float,
        default=DEFAULT_SHARD_BYTES / 1e9,
        help="largest file of a folder, in 10^9 bytes (%(default)g)",
    )
    add_token_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Open, see it under the other names, write it piece by piece."""
    is_checkpoint = (options.input / MANIFEST).is_file()
    if options.source == options.target and not (is_checkpoint or options.dtype):
        raise IlmCompileError(
            f"convert: --from and --to are both {options.source}, so there is nothing to do"
        )
    pieces = (options.begin_of_document, options.end_of_document)
    if (options.tokenizer and options.target != "hf-llama") or (
        any(pieces) and not options.tokenizer
    ):
        raise IlmCompileError(
            "convert: --tokenizer is for the config.json of --to hf-llama, --begin-of-document and "
            "--end-of-document go with a --tokenizer; leave out what would have no effect"
        )
    if not options.shard_gb > 0:
        raise IlmCompileError(f"convert: --shard-gb must be above 0, got {options.shard_gb}")
    tokens = find_tokens(options) if options.target == "hf-llama" else None
    model = load_model(options.model)
    check_formats(model, options.source, options.target)
    source = open_weights(model, options.input, options.source)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    number = write_model(
        model,
        source,
        options.target,
        options.output,
        dtype=dtype,
        shard_bytes=int(options.shard_gb * 1e9),
        extra=None if tokens is None else hf_llama_config(model, dtype, tokens),
    )
    print(f"wrote {number} tensors to {options.output}")

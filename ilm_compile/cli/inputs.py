"""The options that say what one micro-batch looks like."""

import argparse

import torch

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.trace import ExampleInputs


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --seq-len and --rows."""
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens a row, if not the model's")
    parser.add_argument("--rows", type=int, metavar="N", help="of one micro-batch; with --seq-len")


def read_inputs(options: argparse.Namespace) -> ExampleInputs | None:
    """Those of a causal language model, or None: those that the model itself names."""
    if options.seq_len is None:
        if options.rows is not None:
            raise IlmCompileError(f"--rows {options.rows} needs --seq-len beside it")
        return None
    return token_inputs(1 if options.rows is None else options.rows, options.seq_len)


def token_inputs(rows: int, tokens: int) -> ExampleInputs:
    """The inputs of a causal language model."""
    return {name: ((rows, tokens), torch.int64) for name in ("input_ids", "labels")}

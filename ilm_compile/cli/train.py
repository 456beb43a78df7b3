"""Train a model on text, byte by byte.

One process, or several under torchrun:
  torchrun --nproc-per-node 4 -m ilm_compile.cli train internlm2_tiny --tp 2 --pp 2 \\
      --data book.txt --steps 100 --out runs/book
"""

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import nn

from ilm_compile.cli.files import SUFFIX, read_tensors, read_text, write_tensors
from ilm_compile.cli.model import add_model_argument, load_model
from ilm_compile.cli.plan import add_plan_arguments, read_plan
from ilm_compile.cli.prepare_data import SEQ_LEN
from ilm_compile.compile import parallelize
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime import (
    BatchIterator,
    ByteTokenizer,
    PackedText,
    Trainer,
    documents_from_files,
    pack_documents,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_argument(parser)
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="text files, each a document, or one file of prepare-data",
    )
    parser.add_argument(
        "--seq-len", type=int, metavar="N", help=f"tokens a row, of text files; default {SEQ_LEN}"
    )
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="of one micro-batch")
    parser.add_argument("--steps", type=int, required=True, metavar="N")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate, default 3e-4")
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="start from these: safetensors, our names"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="for metrics and weights"
    )
    add_plan_arguments(parser)
    parser.add_argument(
        "--zero", type=int, choices=(1, 3), help="shard over dp: 3, the parameters too"
    )
    parser.add_argument("--seed", type=int, help="of initial weights and of the order of the data")


def run(options: argparse.Namespace) -> None:
    """Train, then write the weights."""
    plan = read_plan(options)
    metrics, weights = options.out / "metrics.jsonl", options.out / f"weights{SUFFIX}"
    if metrics.exists():
        raise IlmCompileError(f"train: {metrics} exists; choose another folder with --out")
    model = load_model(options.model)
    _require_byte_model(model)
    text = _read_data(options.data, options.seq_len)
    initial = read_tensors(options.weights) if options.weights else None

    one_row = text.batch(torch.zeros(options.rows, dtype=torch.int64))
    parallel = parallelize(model, plan=plan, example_inputs=one_row)
    if initial is not None:
        parallel.load_state_dict(initial)
    global_rows = options.rows * plan.num_microbatches * parallel.mesh.dp.size
    batches = BatchIterator(text, global_batch_size=global_rows, seed=plan.seed)
    Trainer(parallel, lr=options.lr).fit(batches, options.steps, metrics_path=metrics)
    trained = parallel.full_state_dict()
    if trained:  # on rank 0
        write_tensors(trained, weights)
        print(f"wrote {metrics} and {weights}")


def _require_byte_model(model: nn.Module) -> None:
    arguments = inspect.signature(model.forward).parameters
    expected = [field.name for field in fields(PackedText)]
    if not set(expected) <= set(arguments):
        raise IlmCompileError(
            f"train: expected a model whose forward takes {', '.join(expected)}, as the presets' "
            f"does; {type(model).__name__} takes {', '.join(arguments)}. Train it with a script: "
            "see examples/train_internlm2.py"
        )
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", ByteTokenizer.vocab_size)
    if vocab_size < ByteTokenizer.vocab_size:
        raise IlmCompileError(
            f"train: expected a vocabulary of at least {ByteTokenizer.vocab_size} for bytes, "
            f"{type(model).__name__} has {vocab_size}"
        )


def _read_data(paths: Sequence[Path], seq_len: int | None) -> PackedText:
    if all(path.suffix != SUFFIX for path in paths):
        return pack_documents(documents_from_files(paths), seq_len=seq_len or SEQ_LEN)
    if len(paths) > 1:
        raise IlmCompileError(
            f"train: expected text files or one prepared file as --data, got {len(paths)} files, "
            f"a {SUFFIX} among them"
        )
    if seq_len is not None:
        raise IlmCompileError("train: --seq-len is for text files; a prepared file has its own")
    return read_text(paths[0])

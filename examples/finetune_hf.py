"""Fine-tune a Hugging Face folder on conversations, and get a Hugging Face folder back.

    python -m examples.finetune_hf --model Qwen2-0.5B --data chat.jsonl --out runs/chat
    torchrun --nproc-per-node 4 -m examples.finetune_hf --tp 2 --lora 8 ...

Without --model a small Llama with random weights is made, without --data sums to learn. Full
weights need ``pip install 'ilm_compile[hf]'``, --lora ``pip install 'ilm_compile[lora]'``. Ranks
beyond tp are data-parallel. Only the answers are learnt; each row is one conversation.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ilm_compile
from ilm_compile import IlmCompileError, Parallel, Trainer
from ilm_compile.examples.finetune_start import write_conversations, write_model
from ilm_compile.runtime import BatchIterator, lr_schedule
from ilm_compile.runtime.data import (
    Conversations,
    ValidationBatches,
    chat_of,
    labels_in_place,
    load_tokenizer,
)
from ilm_compile.runtime.evaluation import evaluate
from ilm_compile.runtime.mesh import choose_device, join_job

TOLERANCE = 1e-4  # of the logits, in float32
HELD_OUT = 10  # every tenth conversation is for the evaluation


class Part:
    """Some rows of conversations, with labels as Hugging Face's models shift them."""

    def __init__(self, whole: Conversations, rows: list[int]) -> None:
        self._whole, self._rows = whole, torch.tensor(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        batch = labels_in_place(self._whole.batch(self._rows[rows]))
        return {name: batch[name] for name in ("input_ids", "labels")}

    def identity(self) -> dict[str, int | str]:
        return {**self._whole.identity(), "num_rows": len(self), "first": int(self._rows[0])}


def read_data(
    folder: Path, path: Path, seq_len: int, vocab_size: int, say: Callable[[str], None]
) -> tuple[Part, Part]:
    """Rows for training and for evaluation, by the tokenizer and template of a model's folder."""
    chat = chat_of(folder / "tokenizer.json")
    whole = Conversations(
        [path],
        tokenizer=load_tokenizer(folder / "tokenizer.json", end=chat.end),
        chat=chat,
        seq_len=seq_len,
        vocab_size=vocab_size,
        too_long="truncate",
    )
    if len(whole) < 2:
        raise IlmCompileError(f"{path}: expected at least two conversations with an answer, got 1")
    say(
        f"{len(whole)} conversations by {chat.name}; {whole.num_cut} are cut after {seq_len} tokens"
    )
    if whole.num_left_out:
        say(f"{whole.num_left_out} more have no answer there and are left out")
    rows = list(range(len(whole)))
    return Part(whole, [row for row in rows if row % HELD_OUT]), Part(whole, rows[::HELD_OUT])


def load_model(folder: Path, lora: int) -> nn.Module:
    """The model of a folder in float32, with adapters of rank `lora` on every linear if not 0."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache=False)
    if not lora:
        return model
    try:
        import peft
    except ImportError as error:
        raise IlmCompileError(
            "--lora needs peft: pip install 'ilm_compile[lora]', or leave --lora out to train all "
            "weights"
        ) from error
    torch.manual_seed(0)  # the adapters' weights are to be the same on every rank
    options = {"r": lora, "lora_alpha": 2 * lora, "target_modules": "all-linear"}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))


def save(parallel: Parallel, model: nn.Module, tokens_of: Path, out: Path) -> None:
    """Write a folder that transformers loads, adapters merged into the weights. Collective."""
    from transformers import AutoTokenizer

    weights = parallel.full_state_dict()  # on rank 0 only
    if parallel.mesh.rank == 0:
        model.load_state_dict(weights)
        whole: Any = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        whole.config.use_cache = True
        whole.save_pretrained(out)
        AutoTokenizer.from_pretrained(tokens_of).save_pretrained(out)


def largest_difference(parallel: Parallel, batch: dict[str, Tensor], out: Path) -> float:
    """Of the logits on rank 0's rows, between the trained model and the folder. Collective.

    Relative to the largest logit; 0.0 on other ranks.
    """
    from transformers import AutoModelForCausalLM

    parallel.eval()
    logits, _, _ = parallel.execute_schedule(batch, forward_only=True, return_output_label=True)
    parallel.train()
    if parallel.mesh.rank:
        return 0.0
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).to(logits.device)
    with torch.no_grad():
        again = loaded(batch["input_ids"][: len(logits)].to(logits.device)).logits
    return ((logits - again).abs().max() / logits.abs().max()).item()


def finetune(options: argparse.Namespace) -> float:
    """The whole job; returns `largest_difference`."""
    if (options.out / "model").exists():
        raise IlmCompileError(f"{options.out / 'model'} exists; remove it, or choose another --out")
    device, rank, num_ranks = choose_device(), 0, 1
    if "WORLD_SIZE" in os.environ:
        join_job(device, timeout=timedelta(minutes=5))
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda text: None
    start, data = options.model or options.out / "start", options.data or options.out / "sums.jsonl"
    if rank == 0:
        if options.data is None:
            write_conversations(data)
        if options.model is None:
            write_model(start, data.read_text().splitlines())
    if num_ranks > 1:
        dist.barrier()  # the files are there
    model = load_model(start, options.lora)
    train, valid = read_data(start, data, options.seq_len, model.config.vocab_size, say)
    shape = ((options.rows, options.seq_len), torch.int64)
    parallel = ilm_compile.parallelize(
        model,
        tp=options.tp,
        num_microbatches=options.micro,
        example_inputs={"input_ids": shape, "labels": shape},
    )
    num_rows = options.rows * options.micro * parallel.mesh.dp.size
    say(f"tp={options.tp}, dp={parallel.mesh.dp.size}, {num_rows} conversations a step")
    held_out = ValidationBatches(valid, global_batch_size=num_rows)
    trainer = Trainer(
        parallel,
        lr=options.lr,
        lr_scheduler=lambda optimizer: lr_schedule(
            optimizer, warmup_steps=options.steps // 10, total_steps=options.steps
        ),
    )
    say(f"before: {told(evaluate(parallel, held_out))}")
    steps = trainer.fit(
        BatchIterator(train, global_batch_size=num_rows), options.steps, progress=False
    )
    for metrics in steps[:: max(1, options.steps // 5)]:
        say(f"step {metrics.step}: loss {metrics.loss:.4f}")
    say(f"after: {told(evaluate(parallel, held_out))}")
    save(parallel, model, start, options.out / "model")
    difference = largest_difference(parallel, next(iter(held_out)), options.out / "model")
    say(f"saved {options.out / 'model'}; its logits differ by {difference:.1e} of the largest")
    if difference > TOLERANCE:
        raise IlmCompileError(f"{options.out / 'model'}: expected a difference below {TOLERANCE}")
    return difference


def told(metrics: dict[str, float]) -> str:
    return (
        f"loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.3f} of "
        f"{metrics['num_tokens']} held-out tokens"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model")
    parser.add_argument("--data", type=Path, help="conversations, .jsonl or .json")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="0: all weights")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4, help="conversations of a micro-batch")
    parser.add_argument("--micro", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-3)
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("transformers") is None:
        print(
            "finetune_hf: transformers is missing: pip install 'ilm_compile[hf]'", file=sys.stderr
        )
        return 1
    try:
        finetune(options)
    except (IlmCompileError, OSError) as error:
        print(f"finetune_hf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a small InternLM2 on the Python language reference, in four processes on one machine:

    torchrun --standalone --nproc-per-node 4 -m examples.train_internlm2 --out runs/internlm2

The model is an ordinary nn.Module that knows nothing of processes; `parallelize` divides it.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ilm_compile
from ilm_compile import models, runtime

MICRO_BATCH, NUM_MICROBATCHES, SEQ_LEN = 2, 4, 128
NUM_STEPS, LR, MAX_GRAD_NORM = 250, 2e-3, 1.0


def make_model() -> models.InternLM2:
    # About 1 / sqrt(hidden_size): from the 0.02 of wide models a narrow one learns slowly at first.
    stds = dict.fromkeys(
        ("attn_wqkv_init_std", "attn_other_init_std", "ffn_uplayer_init_std", "ffn_other_init_std"),
        0.08,
    )
    return models.internlm2_tiny(
        hidden_size=128,
        num_attention_heads=4,
        num_kv_attention_heads=2,
        mlp_ratio=2.0,
        vocab_size=runtime.ByteTokenizer.vocab_size,
        **stds,
    )


def make_batches() -> runtime.BatchIterator:
    """Endless batches of text, the same in every process; each process works on its part."""
    text = runtime.pack_documents(runtime.documents_from_pydoc(), seq_len=SEQ_LEN)
    return runtime.BatchIterator(text, global_batch_size=MICRO_BATCH * NUM_MICROBATCHES)


def learning_rate(optimizer: Optimizer, num_steps: int) -> LRScheduler:
    return runtime.lr_schedule(optimizer, warmup_steps=num_steps // 20, total_steps=num_steps)


def train(out: Path, num_steps: int = NUM_STEPS, *, tp: int = 2, pp: int = 2) -> None:
    with torch.device("meta"):  # no weights yet: each process makes those of its part
        model = make_model()
    parallel = ilm_compile.parallelize(
        model,
        tp=tp,
        pp=pp,
        num_microbatches=NUM_MICROBATCHES,
        schedule="1f1b",
        example_inputs={name: x[:MICRO_BATCH] for name, x in next(make_batches()).items()},
    )
    trainer = ilm_compile.Trainer(
        parallel,
        lr=LR,
        lr_scheduler=partial(learning_rate, num_steps=num_steps),
        max_grad_norm=MAX_GRAD_NORM,
    )
    trainer.fit(make_batches(), num_steps, metrics_path=out / "metrics.jsonl")
    weights = parallel.full_state_dict()  # the names and shapes of the model; on rank 0 only
    if weights:
        save_file(weights, out / "weights.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/internlm2"))
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    options = parser.parse_args()
    train(options.out, options.steps)

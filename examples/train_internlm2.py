"""Train a small InternLM2 on the Python language reference, in four processes:

    torchrun --standalone --nproc-per-node 4 -m examples.train_internlm2 --tp 2 --pp 2

The model is an ordinary nn.Module that knows nothing of processes; `parallelize` divides it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import ilm_compile
from ilm_compile import models
from ilm_compile.runtime import (
    BatchIterator,
    ByteTokenizer,
    adamw,
    documents_from_pydoc,
    lr_schedule,
    pack_documents,
)

SEQ_LEN = 128
MICRO_BATCH, NUM_MICROBATCHES = 2, 4


def make_model() -> models.InternLM2:
    return models.internlm2_tiny(
        hidden_size=128,
        num_attention_heads=4,
        num_kv_attention_heads=2,
        mlp_ratio=2.0,
        vocab_size=ByteTokenizer.vocab_size,
    )


def make_batches() -> Iterator[dict[str, Tensor]]:
    text = pack_documents(documents_from_pydoc(), seq_len=SEQ_LEN)
    return BatchIterator(text, global_batch_size=MICRO_BATCH * NUM_MICROBATCHES)


def make_optimizer(parameters, num_steps: int) -> tuple[Optimizer, LRScheduler]:
    optimizer = adamw(parameters, lr=4e-3)
    return optimizer, lr_schedule(optimizer, warmup_steps=num_steps // 20, total_steps=num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/internlm2"))
    options = parser.parse_args()

    batches = make_batches()
    with torch.device("meta"):  # every rank makes its own part only, the same under every plan
        model = make_model()
    parallel = ilm_compile.parallelize(
        model,
        tp=options.tp,
        pp=options.pp,
        num_microbatches=NUM_MICROBATCHES,
        example_inputs={name: x[:MICRO_BATCH] for name, x in next(make_batches()).items()},
    )
    optimizer, lr_scheduler = make_optimizer(parallel.named_parameters(), options.steps)
    trainer = ilm_compile.Trainer(parallel, optimizer=optimizer, lr_scheduler=lr_scheduler)
    trainer.fit(batches, options.steps, metrics_path=options.out / "metrics.jsonl")
    weights = parallel.full_state_dict()
    if weights:  # on rank 0
        save_file(weights, options.out / "weights.safetensors")


if __name__ == "__main__":
    main()

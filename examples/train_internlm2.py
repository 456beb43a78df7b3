"""Train a small InternLM2 on the Python language reference. In four processes, all on one machine:

    torchrun --standalone --nproc-per-node 4 -m examples.train_internlm2 runs/internlm2

The model is an ordinary nn.Module that knows nothing of processes; `parallelize` divides it.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

import ilm_compile
from ilm_compile import models
from ilm_compile.runtime import BatchIterator, ByteTokenizer, PackedText
from ilm_compile.runtime import documents_from_pydoc, lr_schedule, pack_documents

MICRO_BATCH, NUM_MICROBATCHES, SEQ_LEN = 2, 4, 128
NUM_STEPS, LR, WARMUP = 300, 4e-3, 0.05


def make_model() -> models.InternLM2:
    return models.internlm2_tiny(
        hidden_size=128,
        num_attention_heads=4,
        num_kv_attention_heads=2,
        mlp_ratio=2.0,
        vocab_size=ByteTokenizer.vocab_size,
    )


def make_data() -> PackedText:
    return pack_documents(documents_from_pydoc(), seq_len=SEQ_LEN)


def train(out: Path, *, num_steps: int = NUM_STEPS, tp: int = 2, pp: int = 2) -> None:
    with torch.device("meta"):  # each process makes its own part only
        model = make_model()
    data = make_data()
    parallel = ilm_compile.parallelize(
        model,
        tp=tp,
        pp=pp,
        num_microbatches=NUM_MICROBATCHES,
        schedule="1f1b",
        example_inputs=data.batch(torch.arange(MICRO_BATCH)),
    )
    schedule = partial(lr_schedule, warmup_steps=int(num_steps * WARMUP), total_steps=num_steps)
    trainer = ilm_compile.Trainer(parallel, lr=LR, lr_scheduler=schedule)
    batches = BatchIterator(data, global_batch_size=MICRO_BATCH * NUM_MICROBATCHES)
    trainer.fit(batches, num_steps, metrics_path=out / "metrics.jsonl")
    weights = parallel.full_state_dict()  # as the model's own state_dict; empty but on rank 0
    if weights:
        save_file(weights, out / "weights.safetensors")


if __name__ == "__main__":
    train(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/internlm2"))

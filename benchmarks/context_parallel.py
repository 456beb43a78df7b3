"""What context parallelism saves and sends: long rows of a small InternLM2 on 1, 2 and 4 processes.

    python -m benchmarks.context_parallel [--sequences 1024 4096 ...] [--output FILE]

For each length of a row and each cp, of the rank with most: the bytes that its forward keeps for
its backward (storages that autograd saves, parameters not counted), the bytes that its graph sends
in a step, the median seconds of a step, and the loss, which must be the same under every cp.
Seconds mean something only where there are as many cores as processes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.table import Table

import ilm_compile
from benchmarks.common import RESULTS, launch, make_console, make_model, random_batch, save_json
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.observe.saved import SavedBytes

FIELDS = {
    **{"vocab_size": 2048, "hidden_size": 256, "num_layers": 4},
    **{"num_attention_heads": 8, "num_kv_attention_heads": 4},
}
SEQUENCES = (1024, 2048, 4096, 8192)
RANKS = (1, 2, 4)
AGREEMENT = 1e-5  # relative, of losses in fp32


@dataclass(frozen=True, slots=True)
class Figure:
    """One length under one cp, of the rank with most: bytes per rank and step, seconds a step."""

    sequence: int
    cp: int
    saved_bytes: int
    sent_bytes: int
    seconds: float
    loss: float


def run_rank(cp: int, sequences: Sequence[int], repeats: int) -> list[Figure]:
    """This rank's figures."""
    return [_measure(cp, sequence, repeats) for sequence in sequences]


def _measure(cp: int, sequence: int, repeats: int) -> Figure:
    model = make_model("internlm2_tiny", {**FIELDS, "max_seq_len": sequence})
    spec = ((1, sequence), torch.int64)
    parallel = ilm_compile.parallelize(
        model, cp=cp, example_inputs={"input_ids": spec, "labels": spec}
    )
    batch = random_batch(1, sequence, FIELDS["vocab_size"])
    saved = SavedBytes(parallel.stages)
    saved.start()
    loss = parallel.execute_schedule(batch)
    saved.stop()
    kept = sum(n for regions in saved.bytes.values() for n in regions.values())
    before = sum(traffic.num_bytes for traffic in parallel.traffic().values())
    times = []
    for _ in range(repeats):
        parallel.zero_grad()
        if dist.is_initialized():
            dist.barrier()
        start = time.perf_counter()
        parallel.execute_schedule(batch)
        times.append(time.perf_counter() - start)
    sent = sum(traffic.num_bytes for traffic in parallel.traffic().values()) - before
    return Figure(sequence, cp, kept, sent // repeats, median(times), float(loss))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="bytes and seconds of context parallelism")
    parser.add_argument("--sequences", type=int, nargs="+", default=SEQUENCES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "context_parallel.json")
    options = parser.parse_args(arguments)
    figures = [
        max(same, key=lambda figure: figure.saved_bytes)
        for cp in RANKS
        for same in zip(*launch(run_rank, cp, cp, options.sequences, options.repeats), strict=True)
    ]
    first = {figure.sequence: figure for figure in figures if figure.cp == 1}
    table = Table("row", "cp", "kept for backward", "of cp=1", "sent", "seconds", "loss")
    for figure in sorted(figures, key=lambda f: (f.sequence, f.cp)):
        whole = first[figure.sequence]
        if abs(figure.loss - whole.loss) > AGREEMENT * abs(whole.loss):
            raise IlmCompileError(
                f"context_parallel: expected the loss {whole.loss} of cp=1, got {figure.loss} at "
                f"{figure.sequence} tokens and cp={figure.cp}"
            )
        table.add_row(
            f"{figure.sequence:,}",
            str(figure.cp),
            f"{figure.saved_bytes / 2**20:,.1f} MiB",
            f"{figure.saved_bytes / whole.saved_bytes:.3f}",
            f"{figure.sent_bytes / 2**20:,.1f} MiB",
            f"{figure.seconds:.2f}",
            f"{figure.loss:.6f}",
        )
    make_console().print(table)
    save_json(options.output, {"model": FIELDS, "figures": [asdict(each) for each in figures]})


if __name__ == "__main__":
    main()

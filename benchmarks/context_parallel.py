"""What context parallelism saves and sends: long rows of a small Llama on 1, 2 and 4 processes.

    python -m benchmarks.context_parallel [--sequences 1024 4096 ...] [--hidden 256] [--layers 4]
        [--output FILE]

For each length of a row, each cp and each way to divide attention, of the rank with most: the bytes
that its forward keeps for its backward (storages that autograd saves, parameters not counted), the
bytes that its graph sends in a step, the FLOPs of its products and attentions in a step, counted as
they run (`balance`: against the mean of the ranks), and the median seconds of a step. The loss must
be the same everywhere. Beside them: whether the context parallelism of torch.distributed.tensor's
`experimental` runs here, on the attention of one layer (the whole model, unmodified, waits forever:
its ranks make different masks from their positions). Seconds mean something only where there are as
many cores as processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import ilm_compile
from benchmarks.common import RESULTS, launch, make_console, make_parser, random_batch, save_json
from ilm_compile.errors import IlmCompileError
from ilm_compile.kernels.attention_blocks import KERNELS
from ilm_compile.runtime.observe.saved import SavedBytes

VOCAB = 2048
HIDDEN, LAYERS = 256, 4
SEQUENCES = (1024, 2048, 4096)
CP = (2, 4)
WAYS = ("heads", "queries", "ring")
AGREEMENT = 1e-5  # relative, of losses in fp32


@dataclass(frozen=True, slots=True)
class Figure:
    """One length under one plan, of the rank with most: bytes and FLOPs of a step, its seconds."""

    sequence: int
    cp: int
    attention: str
    saved_bytes: int
    sent_bytes: int
    flops: int
    seconds: float
    loss: float
    balance: float = 1.0


def _attention_flops(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> int:
    return int(sdpa_flop_count(q.shape, *_for_each_head(q, k, v)))


def _attention_backward_flops(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, *_for_each_head(q, k, v)))


def _for_each_head(q: Tensor, *shared: Tensor) -> list[tuple[int, ...]]:
    """Return shapes with a head for each of the queries': torch 2.11 counts no other."""
    return [(len(x), q.shape[1], *x.shape[2:]) for x in shared]


def _counter() -> FlopCounterMode:
    """Counts products, and attention on the CPU by all scores that it computes, masked or not."""
    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    for rule in known.values():
        rule._get_raw = True  # type: ignore[attr-defined] - it is given tensors, not shapes
    return FlopCounterMode(display=False, custom_mapping=known)


@contextmanager
def _blocks() -> Iterator[list[int]]:
    """Within it, the FLOPs of each block of a ring are listed: into its op no counter looks."""
    counted: list[int] = []
    forward, backward = KERNELS["cpu"]

    def count_forward(*args: Any) -> Any:
        counted.append(_attention_flops(*args))
        return forward(*args)

    def count_backward(*args: Any) -> Any:
        counted.append(_attention_backward_flops(*args))
        return backward(*args)

    with mock.patch.dict(KERNELS, cpu=(count_forward, count_backward)):
        yield counted


def fields_of(hidden: int, layers: int) -> dict[str, int]:
    """Return the model's fields of transformers' `LlamaConfig`."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": 3 * hidden}
    return {"vocab_size": VOCAB, **sizes, "num_attention_heads": 8, "num_key_value_heads": 4}


def make_llama(fields: dict[str, int]) -> nn.Module:
    """The model, with the same weights in each process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**fields, max_position_embeddings=1 << 16))


def run_rank(cp: int, sequence: int, repeats: int, fields: dict[str, int]) -> list[Figure]:
    """This rank's figures of one length, one for each way to divide attention."""
    ways = WAYS if cp > 1 else (None,)
    return [_measure(cp, way, sequence, repeats, fields) for way in ways]


def _measure(
    cp: int, way: str | None, sequence: int, repeats: int, fields: dict[str, int]
) -> Figure:
    spec = ((1, sequence), torch.int64)
    parallel = ilm_compile.parallelize(
        make_llama(fields),
        cp=cp,
        cp_attention=way,
        example_inputs={"input_ids": spec, "labels": spec},
    )
    batch = random_batch(1, sequence, VOCAB)
    saved = SavedBytes(parallel.stages)
    saved.start()
    with _counter() as counter, _blocks() as blocks:
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
    flops = counter.get_total_flops() + sum(blocks)
    return Figure(
        *(sequence, cp, way or "whole", kept, sent // repeats, flops),
        *(median(times), float(loss)),
    )


def of_most(ranks: Sequence[Figure]) -> Figure:
    """One figure of those of all ranks: the most of each number, and how even the FLOPs are."""
    first = ranks[0]
    numbers = ("saved_bytes", "sent_bytes", "flops", "seconds")
    most = {name: max(getattr(figure, name) for figure in ranks) for name in numbers}
    balance = most["flops"] / mean(figure.flops for figure in ranks)
    return Figure(
        first.sequence, first.cp, first.attention, **most, loss=first.loss, balance=balance
    )


def run_torch(sequence: int) -> str:
    """Whether one causal attention runs under torch's context parallelism, or what it raises."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    q = torch.randn(1, 8, sequence, HIDDEN // 8)
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        with context_parallel(mesh, buffers=[q], buffer_seq_dims=[2]):
            F.scaled_dot_product_attention(q, q, q, is_causal=True)
    except Exception as error:  # whatever it is, it is the result
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        dist.destroy_process_group()
    return "runs"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = make_parser("context_parallel", __doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=SEQUENCES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--output", type=Path, default=RESULTS / "context_parallel.json")
    options = parser.parse_args(arguments)
    fields = fields_of(options.hidden, options.layers)
    content: dict[str, Any] = {"model": fields, "figures": []}
    content["torch"] = launch(run_torch, 2, min(options.sequences))[0]
    figures = []
    for sequence in options.sequences:
        for cp in (1, *CP):
            ranks = launch(run_rank, cp, cp, sequence, options.repeats, fields)
            figures += [of_most(each) for each in zip(*ranks, strict=True)]
        content["figures"] = [asdict(each) for each in figures]
        save_json(options.output, content)  # long rows take minutes: what is there is kept
    show(figures)
    theirs = content["torch"]
    make_console().print(f"torch {torch.__version__}, context_parallel on the CPU: {theirs}")


def show(figures: Sequence[Figure]) -> None:
    """Print a table. Raises `IlmCompileError` where a loss is not that of one rank."""
    first = {figure.sequence: figure for figure in figures if figure.cp == 1}
    table = Table(
        "row", "cp", "attention", "kept", "of cp=1", "sent", "GFLOP", "balance", "seconds"
    )
    for figure in sorted(figures, key=lambda f: (f.sequence, f.cp, f.attention)):
        whole = first[figure.sequence]
        if abs(figure.loss - whole.loss) > AGREEMENT * abs(whole.loss):
            raise IlmCompileError(
                f"context_parallel: expected the loss {whole.loss} of cp=1, got {figure.loss} at "
                f"{figure.sequence} tokens, cp={figure.cp} and attention by {figure.attention}"
            )
        table.add_row(
            *(f"{figure.sequence:,}", str(figure.cp), figure.attention),
            f"{figure.saved_bytes / 2**20:,.1f} MiB",
            f"{figure.saved_bytes / whole.saved_bytes:.3f}",
            f"{figure.sent_bytes / 2**20:,.1f} MiB",
            f"{figure.flops / 1e9:.1f}",
            f"{figure.balance:.3f}",
            f"{figure.seconds:.2f}",
        )
    make_console().print(table)


if __name__ == "__main__":
    main()

"""Our tensor parallelism beside torch's own: the same Hugging Face Llama, tp=2, real processes.

    python -m benchmarks.tensor_parallel

Three contestants train the same model on the same batch in the same two processes over gloo, taking
turns step by step (A B C, B C A, C A B, ...), forward and backward in fp32:

* ``ours``        `ilm_compile.parallelize(model, tp=2)`, `execute_schedule` of the whole batch;
* ``dtensor``     torch's `parallelize_module` with the plan of its own tutorial: column-wise and
                  row-wise linear layers, a row-wise embedding, a vocabulary-parallel loss;
* ``torchtitan``  the same with sequence parallelism, after what torchtitan does to Llama 3
                  (pytorch/torchtitan, torchtitan/models/llama3/infra/parallelize.py, `apply_tp`, at
                  018740b): norms sharded over the sequence, gathered before attention and
                  feed-forward.

All three must agree on the loss and on the norm of all gradients. A step's time is the longer of
the two ranks', counted from a barrier. The ratio compares the steps of the same round, and is the
median over the rounds: other work on the machine slows all steps of a round alike. Processor time
is that of the first rank's process, all threads, so that waiting for the other rank is free.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, launch, make_console, make_parser, random_batch, save_json
from benchmarks.tensor_parallel_contest import CONTESTANTS, VOCAB, Contestant, Size
from ilm_compile.errors import IlmCompileError

AGREEMENT = 1e-4  # relative, of losses and gradient norms in fp32

SIZES = (
    Size(hidden=128, layers=4, seq=128, repeats=24),
    Size(hidden=256, layers=4, seq=256, repeats=18),
    Size(hidden=512, layers=4, seq=256, repeats=14),
    Size(hidden=512, layers=4, seq=512, repeats=15),
    Size(hidden=1024, layers=2, seq=512, repeats=9),
)


@dataclass(slots=True)
class Sample:
    """What a rank saw of one contestant: seconds of each step, loss and gradient norm."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    loss: float = 0.0
    grad_norm: float = 0.0


Samples = dict[str, Sample]  # by contestant


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """The outcome of one contestant at one size; times are in seconds per step."""

    size: Size
    contestant: str
    median_s: float
    fastest_s: float
    processor_s: float
    ratio_to_ours: float
    processor_ratio: float
    loss: float
    grad_norm: float


def run_rank(sizes: Sequence[Size]) -> list[Samples]:
    """This rank's part: the samples of each size."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    samples = []
    for size in sizes:
        batch = random_batch(size.rows, size.seq, VOCAB)
        contestants = {name: make(size, batch) for name, make in CONTESTANTS.items()}
        samples.append(measure(contestants, size.repeats))
    return samples


def measure(contestants: dict[str, Contestant], repeats: int, warmup: int = 2) -> Samples:
    """Run the contestants in turn, each round begun by the next of them.

    Garbage is collected between the measured parts.
    """
    samples = {name: Sample() for name in contestants}
    order = list(contestants)
    gc.collect()
    gc.freeze()  # what exists by now would be looked through again before every step
    gc.disable()
    try:
        for repetition in range(warmup + repeats):
            for name in order[repetition % len(order) :] + order[: repetition % len(order)]:
                contestant = contestants[name]
                contestant.zero_grad()
                gc.collect()
                dist.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                loss = contestant.step()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                sample = samples[name]
                if repetition == 0:
                    sample.loss, sample.grad_norm = float(loss), contestant.grad_norm()
                if repetition >= warmup:
                    sample.wall.append(wall)
                    sample.cpu.append(cpu)
    finally:
        gc.enable()
        gc.unfreeze()
    return samples


def summarize(size: Size, ranks: Sequence[Samples]) -> list[Figure]:
    """The figures of one size. Raises `IlmCompileError` unless all contestants did the same."""
    ours = ranks[0]["ours"]
    walls = {name: _slowest(ranks, name) for name in ranks[0]}
    figures = []
    for name, wall in walls.items():
        sample = ranks[0][name]
        for what in ("loss", "grad_norm"):
            expected, got = getattr(ours, what), getattr(sample, what)
            if abs(got - expected) > AGREEMENT * abs(expected):
                raise IlmCompileError(
                    f"tensor_parallel: {size}: expected the {what} {expected} of ours, got {got} "
                    f"from {name}; they would not have done the same work"
                )
        figures.append(
            Figure(
                size=size,
                contestant=name,
                median_s=median(wall),
                fastest_s=min(wall),
                processor_s=median(sample.cpu),
                ratio_to_ours=_ratio(wall, walls["ours"]),
                processor_ratio=_ratio(sample.cpu, ours.cpu),
                loss=sample.loss,
                grad_norm=sample.grad_norm,
            )
        )
    return figures


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return median(their / own for their, own in zip(theirs, ours, strict=True))


def _slowest(ranks: Sequence[Samples], name: str) -> list[float]:
    return [max(walls) for walls in zip(*(rank[name].wall for rank in ranks), strict=True)]


def show(figures: Sequence[Figure], console: Console) -> None:
    """Print the figures in milliseconds."""
    table = Table(title="tp=2, forward and backward: milliseconds per step")
    table.add_column("Llama")
    for column in (
        "contestant",
        "median",
        "fastest",
        "processor",
        "time / ours",
        "processor / ours",
    ):
        table.add_column(column, justify="right")
    for figure in figures:
        table.add_row(
            str(figure.size) if figure.contestant == "ours" else "",
            figure.contestant,
            f"{figure.median_s * 1e3:.1f}",
            f"{figure.fastest_s * 1e3:.1f}",
            f"{figure.processor_s * 1e3:.1f}",
            f"{figure.ratio_to_ours:.2f}",
            f"{figure.processor_ratio:.2f}",
            end_section=figure.contestant == list(CONTESTANTS)[-1],
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("tensor_parallel", __doc__)
    parser.add_argument("--sizes", type=int, nargs="*", help="indices of the sizes to measure")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args(arguments)
    chosen = SIZES if options.sizes is None else [SIZES[i] for i in options.sizes]
    ranks = launch(run_rank, 2, chosen)
    figures = [
        figure
        for index, size in enumerate(chosen)
        for figure in summarize(size, [rank[index] for rank in ranks])
    ]
    console = make_console()
    show(figures, console)
    date = datetime.now(UTC).date().isoformat()
    output = options.output or RESULTS / f"tensor-parallel-{date}.json"
    save_json(output, {"transformers": transformers.__version__, "figures": figures})
    console.print(f"written to {output}")


if __name__ == "__main__":
    # What ranks return is pickled under the name of its module, which must not be "__main__".
    from benchmarks.tensor_parallel import main as run

    run()

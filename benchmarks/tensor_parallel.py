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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist
import transformers

from benchmarks.common import dated, launch, make_parser, random_batch, save_json, show_table
from benchmarks.contest import measure
from benchmarks.tensor_parallel_contest import CONTESTANTS, VOCAB, All, Size
from ilm_compile.errors import IlmCompileError

AGREEMENT = 1e-4  # relative, of losses and gradient norms in fp32

SIZES = (
    Size(hidden=128, layers=4, seq=128, repeats=24),
    Size(hidden=256, layers=4, seq=256, repeats=18),
    Size(hidden=512, layers=4, seq=256, repeats=14),
    Size(hidden=512, layers=4, seq=512, repeats=15),
    Size(hidden=1024, layers=2, seq=512, repeats=9),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """What a rank saw of one contestant: seconds of each step, loss and gradient norm."""

    wall: list[float]
    cpu: list[float]
    loss: float
    grad_norm: float


Samples = dict[str, Sample]  # by contestant


Figure = dict[str, Any]  # the outcome of one contestant at one size; seconds per step


def run_rank(sizes: Sequence[Size]) -> list[Samples]:
    """This rank's part: the samples of each size."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    samples = []
    for size in sizes:
        every = All(size, random_batch(size.rows, size.seq, VOCAB))
        results = {name: each.result() for name, each in every.contestants.items()}
        times = measure(every, list(CONTESTANTS), size.repeats)
        samples.append(
            {
                name: Sample([t.wall for t in found], [t.cpu for t in found], *results[name])
                for name, found in times.items()
            }
        )
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
            {
                **{"size": size, "contestant": name},
                **{"median_s": median(wall), "fastest_s": min(wall)},
                "processor_s": median(sample.cpu),
                "ratio_to_ours": _ratio(wall, walls["ours"]),
                "processor_ratio": _ratio(sample.cpu, ours.cpu),
                **{"loss": sample.loss, "grad_norm": sample.grad_norm},
            }
        )
    return figures


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return median(their / own for their, own in zip(theirs, ours, strict=True))


def _slowest(ranks: Sequence[Samples], name: str) -> list[float]:
    return [max(walls) for walls in zip(*(rank[name].wall for rank in ranks), strict=True)]


def show(figures: Sequence[Figure]) -> None:
    """Print the figures in milliseconds."""
    headings = "Llama", "contestant", "median", "fastest", "processor"
    show_table(
        "tp=2, forward and backward: milliseconds per step",
        (*headings, "time / ours", "processor / ours"),
        map(_cells, figures),
        sections=len(CONTESTANTS),
    )


def _cells(figure: Figure) -> tuple[Any, ...]:
    times = ("median_s", "fastest_s", "processor_s")
    return (
        *(figure["size"] if figure["contestant"] == "ours" else "", figure["contestant"]),
        *(f"{figure[name] * 1e3:.1f}" for name in times),
        *(f"{figure[name]:.2f}" for name in ("ratio_to_ours", "processor_ratio")),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("tensor_parallel", __doc__)
    parser.add_argument("--sizes", type=int, nargs="*", help="indices of the sizes to measure")
    parser.add_argument("--output", type=Path, default=dated("tensor-parallel"))
    options = parser.parse_args(arguments)
    chosen = SIZES if options.sizes is None else [SIZES[i] for i in options.sizes]
    ranks = launch(run_rank, 2, chosen)
    figures = [
        figure
        for index, size in enumerate(chosen)
        for figure in summarize(size, [rank[index] for rank in ranks])
    ]
    show(figures)
    save_json(options.output, {"transformers": transformers.__version__, "figures": figures})
    print(f"written to {options.output}")


if __name__ == "__main__":
    # What ranks return is pickled under the name of its module, which must not be "__main__".
    from benchmarks.tensor_parallel import main as run

    run()

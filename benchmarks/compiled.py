"""Steps beside those of plain PyTorch: `python -m benchmarks.compiled`.

A small model of each family in four ways, in turn: plain PyTorch, torch.compile of the whole
model, `parallelize`, and that with ``compile=True``; with --tp 2 the latter two. A step is forward
and backward, with --train also clipping and AdamW. Processor time of the process, on one thread;
of two ranks the sum. A ratio is the median of those of single rounds, of several launches, for
where a process has its memory moves a step by some percent. "products / eager" is what products
and attention alone take, by the profiler: no compiler gets below. The losses of a model must agree,
or nothing is said of its speed. At --hidden 128 the host rules: that is its time per step.
With --dtype bfloat16 products are in bf16 over float32 weights, in PyTorch by torch.autocast.
Rows of other models and sizes stay in the file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import ilm_compile
from benchmarks.common import (
    RESULTS,
    keep_measuring,
    launch,
    make_console,
    make_parser,
    random_batch,
    read_rows,
)
from benchmarks.families import FAMILIES, VOCAB, make_family
from ilm_compile.runtime import Trainer

LAYERS = 4
DTYPES = {None: None, "bfloat16": torch.bfloat16}
STEPS_PROFILED = 5
LR = 1e-12  # the weights stay what they are
PLAIN, WHOLE, EAGER, COMPILED = WAYS = ("PyTorch", "torch.compile", "eager", "compiled")
PRODUCTS = "products"
CALLS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product")
RATIOS = (
    (EAGER, PLAIN),
    (COMPILED, PLAIN),
    (COMPILED, EAGER),
    (COMPILED, WHOLE),
    (PRODUCTS, EAGER),
)


@dataclass(frozen=True)
class Step:
    """What is measured: a micro-batch of `rows` times `tokens`; trains: with the optimizer."""

    model: str
    hidden: int
    rows: int = 1
    tokens: int = 128
    tp: int = 1
    trains: bool = False
    dtype: str | None = None


@dataclass(frozen=True)
class Row:
    """One model: milliseconds of a step in each way, their ratios, and what was compiled."""

    step: Step
    ms: dict[str, float]
    ratios: dict[str, float]
    compilations: list[str] = field(default_factory=list)


def measure(
    step: Step, ways: list[str], *, rounds: int, launches: int = 1, backend: str = "inductor"
) -> Row:
    """The row of one model. Raises `AssertionError` if the ways disagree in the loss."""
    if step.tp > 1:
        ways = [way for way in ways if way in (EAGER, COMPILED)]
    times: dict[str, list[float]] = {}
    for _ in range(launches):
        ranks = _launched(step, ways, rounds, backend)
        for way in ranks[0][0]:
            spent = [sum(of_ranks) for of_ranks in zip(*(r[0][way] for r in ranks), strict=True)]
            times.setdefault(way, []).extend(spent)
    ratios = {
        f"{one} / {other}": median(a / b for a, b in zip(times[one], times[other], strict=True))
        for one, other in RATIOS
        if one in times and other in times
    }
    return Row(step, {way: median(spent) for way, spent in times.items()}, ratios, ranks[0][1])


def _launched(
    step: Step, ways: list[str], rounds: int, backend: str
) -> list[tuple[dict[str, list[float]], list[str]]]:
    """What `_times` says in new processes, by rank; of one rank without torch.distributed."""
    if step.tp > 1:
        return launch(_times, step.tp, step, ways, rounds, backend)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return [pool.submit(_times, step, ways, rounds, backend).result()]


def _times(
    step: Step, ways: list[str], rounds: int, backend: str
) -> tuple[dict[str, list[float]], list[str]]:
    """Milliseconds of each round in each way, on this rank, and what was compiled."""
    torch.set_num_threads(1)
    torch.compiler.reset()  # it compiles one function for eight models at most
    model = make_family(step.model, hidden=step.hidden, layers=LAYERS, dtype=torch.float32)
    batch = random_batch(step.rows, step.tokens, VOCAB)
    example = {key: (tuple(value.shape), value.dtype) for key, value in batch.items()}
    made: list[ilm_compile.Parallel] = []

    def ours(compile: bool | str) -> Callable[[], Tensor]:
        made.append(
            ilm_compile.parallelize(
                model, example_inputs=example, compile=compile, tp=step.tp, dtype=DTYPES[step.dtype]
            )
        )
        return _our_step(made[-1], batch, trains=step.trains)

    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        PLAIN: lambda: _plain_step(model, model, batch, step),
        WHOLE: lambda: _plain_step(
            model, torch.compile(model, dynamic=False, backend=backend), batch, step
        ),
        EAGER: lambda: ours(False),
        COMPILED: lambda: ours(backend),
    }
    runs = {way: makers[way]() for way in ways}
    losses = [run() for run in runs.values() for _ in range(2)]  # the first step compiles
    bound = 2e-2 if step.dtype else 1e-5
    for loss in losses:
        torch.testing.assert_close(loss.float(), losses[0].float(), rtol=bound, atol=bound)
    times: dict[str, list[float]] = {way: [] for way in runs}
    for number in range(rounds):
        turn = list(runs.items())
        for way, run in turn if number % 2 else reversed(turn):
            start = time.process_time()
            run()
            times[way].append((time.process_time() - start) * 1e3)
    if EAGER in runs:
        share = _products(runs[EAGER])
        times[PRODUCTS] = [share * spent for spent in times[EAGER]]
    return times, [str(each) for parallel in made for each in parallel.compilations]


def _products(run: Callable[[], Tensor]) -> float:
    """The share of a step that is of products and attention, without what they call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(STEPS_PROFILED):
            run()
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    products = sum(time for key, time in spent.items() if key.startswith(CALLS))
    return products / sum(spent.values())


def _plain_step(
    model: nn.Module, run: Any, batch: dict[str, Tensor], what: Step
) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", DTYPES[what.dtype], enabled=what.dtype is not None):
            found = run(**batch)
        loss: Tensor = found if isinstance(found, Tensor) else found.loss
        loss.backward()
        if what.trains:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
            optimizer.step()
        return loss.detach()

    return step


def _our_step(
    parallel: ilm_compile.Parallel, batch: dict[str, Tensor], *, trains: bool
) -> Callable[[], Tensor]:
    trainer = Trainer(parallel, lr=LR)

    def step() -> Tensor:
        trainer.zero_grad()
        loss = trainer.execute_schedule(batch)
        assert isinstance(loss, Tensor)
        if trains:
            trainer.step()
        return loss

    return step


def main() -> None:
    parser = make_parser("compiled", __doc__)
    parser.add_argument("--models", nargs="+", default=list(FAMILIES[:6]), choices=FAMILIES)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--tp", type=int, nargs="+", default=[1])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--launches", type=int, default=3, help="of as many rounds")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--dtype", choices=[name for name in DTYPES if name])
    parser.add_argument("--output", type=Path, default=RESULTS / "compiled.json")
    options = parser.parse_args()
    steps = [
        Step(name, hidden, options.rows, options.tokens, tp, options.train, options.dtype)
        for tp in options.tp
        for name in options.models
        for hidden in options.hidden
    ]
    asked = [asdict(step) for step in steps]
    rows: list[Any] = [r for r in read_rows(options.output) if r.get("step") not in (None, *asked)]
    found = (
        measure(step, options.ways, rounds=options.rounds, launches=options.launches)
        for step in steps
    )
    keep_measuring(options.output, rows, found, lambda row: row.step.model)
    names = [f"{one} / {other}" for one, other in RATIOS]
    table = Table("model", "hidden", "tp", *names)
    for row in rows[-len(steps) :]:
        ratios = [f"{row.ratios[n]:.3f}" if n in row.ratios else "" for n in names]
        table.add_row(row.step.model, str(row.step.hidden), str(row.step.tp), *ratios)
    make_console().print(table)


if __name__ == "__main__":
    main()

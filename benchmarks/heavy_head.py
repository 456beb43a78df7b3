"""What choosing stages and recompute together gains where the head is heavy, measured here.

    nice python -m benchmarks.heavy_head [--repeats 10] [--hardware FILE.toml] [--output FILE]

A model of few layers and many words on two pipeline ranks: its head takes as long as several
blocks. Under each memory two plans of it are trained in the same processes, a step of each in turn:
stages and recompute chosen together, and those that `benchmarks.stage_choice` calls uniform. Wall
time of a step of the slowest rank, median; the part by which they differ, as measured and as
simulated for the hardware (`ilm-compile calibrate` writes the file of this machine); and the most
bytes of tensors alive on the fullest rank, beside what was predicted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor, fx, nn

import ilm_compile
from benchmarks.common import (
    RESULTS,
    launch,
    make_model,
    make_parser,
    random_batch,
    save_json,
    show_table,
)
from benchmarks.peak_memory import peak_of
from benchmarks.stage_choice import UniformChooser
from ilm_compile.passes import ChooseStages, lower
from ilm_compile.planner.simulated import simulate_step
from ilm_compile.program.program import Program
from ilm_compile.rewrite.stage_choice import Chooser
from ilm_compile.runtime import Mesh, Parallel
from ilm_compile.schedule import schedule_of

MODEL = {"num_layers": 8, "hidden_size": 256, "vocab_size": 16384}
ROWS, SEQ_LEN, MICROBATCHES, PP = 2, 128, 8, 2
MIB = 2**20
MEMORY = (1024, 210, 190)  # in MiB
WARMUP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class UniformStages(ChooseStages):
    """As many blocks in every stage, the same share of them recomputed."""

    name: ClassVar[str] = "uniform-stages"

    def chooser(self, program: Program, calls: Sequence[fx.Node], edges: Sequence[int]) -> Chooser:
        return UniformChooser.of(super().chooser(program, calls, edges))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One rank under one memory: seconds of a step and peak bytes, simulated and measured."""

    way: str
    memory_mib: int
    rank: int
    recomputed: int
    simulated_s: float
    measured_s: float
    predicted_bytes: float
    measured_bytes: int
    loss: float


def run_rank(memory: Sequence[int], hardware: str, repeats: int) -> list[Figure]:
    """Train both on this rank under each memory, a step of each in turn."""
    model = make_model("internlm2_tiny", MODEL)
    traced = ilm_compile.trace(model, example_inputs=model.example_inputs(ROWS, SEQ_LEN))
    batch = random_batch(ROWS * MICROBATCHES, SEQ_LEN, MODEL["vocab_size"])
    mesh: Mesh | None = None
    found: list[Figure] = []
    for mib in memory:
        sizes: dict[str, Any] = {
            **{"pp": PP, "num_microbatches": MICROBATCHES},
            **{"hardware": hardware, "memory": mib * MIB},
        }
        own = UniformStages(num_stages=PP, **sizes)
        programs = {
            "chosen": ilm_compile.compile(traced, checkpoint="auto", **sizes),
            "uniform": ilm_compile.compile(
                traced, checkpoint="auto", passes=[own], disable=["choose-stages"], **sizes
            ),
        }
        mesh = mesh or Mesh.create(programs["chosen"].plan)
        found += _train_both(programs, mesh, model, batch, repeats)
    return found


def _train_both(
    programs: Mapping[str, Program],
    mesh: Mesh,
    model: nn.Module,
    batch: dict[str, Tensor],
    repeats: int,
) -> Iterator[Figure]:
    trained = {
        way: Parallel(
            lower(each), schedule_of(each.plan), mesh, model, initializer=each.initializer
        )
        for way, each in programs.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in trained}
    losses = dict.fromkeys(trained, 0.0)
    for turn in range(WARMUP_STEPS + repeats):
        for way in sorted(trained, reverse=turn % 2 == 1):
            trained[way].zero_grad()
            dist.barrier()
            start = time.perf_counter()
            loss = trained[way].execute_schedule(batch)
            dist.barrier()
            seconds[way].append(time.perf_counter() - start)
            assert isinstance(loss, Tensor)
            losses[way] = loss.item()
    for way, program in programs.items():
        step = simulate_step(program)
        yield Figure(
            way=way,
            memory_mib=(program.plan.memory_bytes or 0) // MIB,
            rank=mesh.pp.rank,
            recomputed=sum(r.recompute or r.selective for r in program.regions),
            simulated_s=step.seconds,
            measured_s=median(seconds[way][WARMUP_STEPS:]),
            predicted_bytes=step.peak(mesh.pp.rank),
            measured_bytes=peak_of(trained[way], batch),
            loss=losses[way],
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = make_parser("heavy_head", __doc__)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--hardware", default="cpu", help="a name, or a .toml file (cpu)")
    parser.add_argument("--output", type=Path, default=RESULTS / "heavy_head.json")
    options = parser.parse_args(arguments)
    ranks = launch(run_rank, PP, MEMORY, options.hardware, options.repeats)
    figures = [figure for each in zip(*ranks, strict=True) for figure in each]
    show(figures)
    save_json(options.output, {"model": MODEL, "rows": figures})


def show(figures: Sequence[Figure]) -> None:
    """Print a table: of the ranks of a plan, the slowest and the fullest."""
    whole: dict[int, dict[str, Figure]] = {}
    for figure in figures:
        plans = whole.setdefault(figure.memory_mib, {})
        other = plans.get(figure.way, figure)
        plans[figure.way] = replace(
            figure,
            measured_s=max(figure.measured_s, other.measured_s),
            predicted_bytes=max(figure.predicted_bytes, other.predicted_bytes),
            measured_bytes=max(figure.measured_bytes, other.measured_bytes),
        )
    rows = []
    for memory, plans in whole.items():
        one, other = plans["chosen"], plans["uniform"]
        gains = (
            f"{other.simulated_s / one.simulated_s:.3f}, {other.measured_s / one.measured_s:.3f}"
        )
        for way, figure in plans.items():
            seconds = (f"{s:.3f}" for s in (figure.simulated_s, figure.measured_s))
            sizes = (f"{n / MIB:.1f}" for n in (figure.measured_bytes, figure.predicted_bytes))
            gained = gains if way == "uniform" else ""
            rows.append((f"{memory} MiB", way, figure.recomputed, *seconds, *sizes, gained))
    headings = ("memory", "plan", "recomputed", "simulated", "measured", "MiB", "predicted")
    show_table(
        "a step on two ranks: seconds, and MiB of the fullest rank",
        (*headings, "uniform / chosen: simulated, measured"),
        rows,
    )


if __name__ == "__main__":
    # What ranks return is pickled under the name of its module, which must not be "__main__".
    from benchmarks.heavy_head import main as run

    run()

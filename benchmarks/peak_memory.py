"""Peak memory of each pipeline rank, predicted beside measured, under every schedule.

    python -m benchmarks.peak_memory --output benchmarks/results/peak_memory.json

Two processes over gloo run steps of a real pipeline, and every tensor that is alive is counted, as
ops make them and as they go: parameters, gradients, Adam's state, what forwards keep, what a
forward, a backward or a weight part works with, and messages. Predicted by `simulate_step`, from
the program alone. Schedules are all that have a name, and one that `search` finds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import ilm_compile
from benchmarks.common import RESULTS, launch, make_parser, random_batch, save_json, show_table
from ilm_compile.errors import ScheduleError
from ilm_compile.models import internlm2_tiny
from ilm_compile.partitioning import make_plan, make_schedule
from ilm_compile.passes import lower
from ilm_compile.planner import simulate_step
from ilm_compile.program.alive import AliveBytes
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.runtime import Mesh, Parallel
from ilm_compile.schedule import StageTimes, build, known_schedules, search

PP, MICRO_BATCHES, ROWS, SEQ, VOCAB = 2, 6, 2, 128, 2048
CHECKPOINTS: tuple[bool | str, ...] = (False, "selective", True)
BOUND = 0.03


@dataclass(frozen=True, slots=True)
class Peak:
    """Bytes of one rank at the fullest moment of a step."""

    schedule: str
    checkpoint: bool | str
    rank: int
    predicted: float
    measured: int

    @property
    def error(self) -> float:
        """Of what is predicted, relative to what is measured."""
        return self.predicted / self.measured - 1


def transformer() -> nn.Module:
    """8 blocks of hidden size 256, in float32."""
    torch.manual_seed(0)
    return internlm2_tiny(num_layers=8, hidden_size=256, vocab_size=VOCAB, max_seq_len=SEQ).float()


def plans(folder: Path, checkpoints: Iterable[bool | str] = CHECKPOINTS) -> Iterator[Plan]:
    """Yield a plan for each schedule, with as few chunks as it takes, and each checkpoint."""
    found = folder / "found.csv"
    times = [StageTimes(forward=1.0, backward=1.2, weight=0.6)] * PP
    search(times, pp=PP, num_microbatches=MICRO_BATCHES, max_in_flight=PP + 1).to_csv(found)
    for name in (*known_schedules(), str(found)):
        chunks = 1 if name == str(found) else chunks_of(name)
        for checkpoint in checkpoints:
            yield make_plan(
                pp=PP,
                num_chunks=chunks,
                num_microbatches=MICRO_BATCHES,
                schedule=name,
                checkpoint=checkpoint,
            )


def name_of(plan: Plan) -> str:
    """Return what a schedule is called here."""
    return "found" if plan.schedule.endswith(".csv") else plan.schedule


def chunks_of(schedule: str) -> int:
    """Return the fewest chunks with which a schedule can be built."""
    try:
        build(schedule, pp=PP, num_microbatches=MICRO_BATCHES, num_chunks=1)
    except ScheduleError:
        return 2
    return 1


def compiled(plans: Sequence[Plan]) -> Iterator[tuple[Plan, Program, Parallel]]:
    """Yield the model under each plan, ready to run on this rank; it is traced once."""
    model = transformer()
    example = {name: ((ROWS, SEQ), torch.int64) for name in ("input_ids", "labels")}
    traced = ilm_compile.trace(model, example_inputs=example)
    mesh = Mesh.create(plans[0])
    for plan in plans:
        program = ilm_compile.compile(traced, plan=plan)
        parallel = Parallel(
            lower(program), make_schedule(plan), mesh, model, initializer=program.initializer
        )
        yield plan, program, parallel


def measure(plans: Sequence[Plan]) -> list[Peak]:
    """Return the peaks of this rank under each plan, of its second step with an optimizer."""
    peaks, batch = [], random_batch(ROWS * MICRO_BATCHES, SEQ, VOCAB)
    for plan, program, parallel in compiled(plans):
        rank = parallel.mesh.pp.rank
        predicted = simulate_step(program).peak(rank)
        peaks.append(
            Peak(name_of(plan), plan.checkpoint, rank, predicted, peak_of(parallel, batch))
        )
    return peaks


def peak_of(parallel: Parallel, batch: dict[str, Tensor]) -> int:
    """Return the most bytes of tensors that are alive in a step of `batch`."""
    parameters = [parameter for _, parameter in parallel.named_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, foreach=False)
    parallel.execute_schedule(batch)
    optimizer.step()
    parallel.zero_grad()
    states = [value for state in optimizer.state.values() for value in state.values()]
    stay = [*parameters, *states]
    with torch.no_grad():
        held: list[Tensor] = [t.to_local() if isinstance(t, DTensor) else t for t in stay]
    others = [t for stage in parallel.stages for t in stage.module.buffers()]
    with AliveBytes() as alive:
        alive.add([*others, *batch.values()], counted=False)
        alive.add(held)
        parallel.execute_schedule(batch)
    return alive.peak


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all, print a table and write the JSON."""
    parser = make_parser("peak_memory", __doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "peak_memory.json")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        ranks = launch(measure, PP, list(plans(Path(folder))))
    peaks = [peak for each in zip(*ranks, strict=True) for peak in each]
    lines = []
    for p in peaks:
        sizes = (f"{size / 2**20:.2f}" for size in (p.predicted, p.measured))
        lines.append((p.schedule, p.checkpoint, p.rank, *sizes, f"{p.error:+.2%}"))
    headings = ("schedule", "checkpoint", "rank", "predicted", "measured", "error")
    show_table("MiB of the fullest moment of a rank", headings, lines)
    worst = max(abs(peak.error) for peak in peaks)
    save_json(options.output, {"bound": BOUND, "worst": worst, "rows": peaks})


if __name__ == "__main__":
    main()

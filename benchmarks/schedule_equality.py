"""Whether schedules train as one device does: `python -m benchmarks.schedule_equality`.

Every pipeline schedule x recompute x pp x tp on one small model: real processes over gloo for pp 2
and 4, all ranks emulated in one process, with recompute, for pp 8. Each row tells

loss, gradient    largest relative error against one device in float64, casts to float32 promoted
runs, planned     executions of blocks (the parts into which stages cut them) on all ranks, counted,
                  and what they should be: one for each micro-batch, one more where all of it is
                  recomputed
bits              of loss and gradients in float32, as a hash: those of 1F1B on as many stages of
                  the pipeline, where no tensor parallelism adds them up otherwise

The output keeps what was measured: a further run goes on with what is missing in it or failed.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ilm_compile
from benchmarks.common import RESULTS, keep_measuring, last_line, make_parser, markdown, read_rows
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.proof.emulate import emulate
from tests.support.equality import EXAMPLE, ROWS, compare, make_batch, make_model, reference
from tests.support.promote import promoted_float32
from tests.support.schedules import CHECKPOINTS, SPLIT, block_runs, planned_runs, recompute
from tests.support.traced import traced_once
from tests.support.world import World, WorldError

MODEL = "eight blocks"
MICRO_BATCHES = 8
BOUND = 1e-10
TIMEOUT = 900.0  # seconds of one case
SCHEDULES = [("1f1b", 1), ("gpipe", 1), ("gpipe", 2), ("interleaved_1f1b", 2), *SPLIT.items()]
MESHES = [(2, 1), (4, 1), (2, 2), (4, 2), (8, 1)]  # pp, tp
EMULATED = 8  # pp from which on all ranks are one process


@dataclass(frozen=True)
class Row:
    """One plan: what was found, or why there is nothing."""

    schedule: str
    num_chunks: int
    checkpoint: str
    pp: int
    tp: int
    loss: float = 0.0
    gradient: float = 0.0
    worst: str = ""
    runs: int = 0
    planned: int = 0
    bits: str = ""
    failure: str = ""

    @property
    def plan(self) -> tuple[str, int, str, int, int]:
        return self.schedule, self.num_chunks, self.checkpoint, self.pp, self.tp

    @property
    def is_equal(self) -> bool:
        """Whether it trains as one device does and runs no block more often than planned."""
        is_close = max(self.loss, self.gradient) <= BOUND and self.runs == self.planned
        return is_close and not self.failure

    def __str__(self) -> str:
        if self.failure:
            return self.failure
        return f"{self.loss:.0e} / {self.gradient:.0e}, {self.runs} runs of {self.planned}"


def precision(stored: torch.dtype) -> ExitStack:
    """A context in which the model is traced once in this precision."""
    contexts = ExitStack()
    if stored == torch.float64:
        contexts.enter_context(promoted_float32())
    contexts.enter_context(traced_once((MODEL, stored)))
    return contexts


@cache
def expected() -> tuple[Tensor, dict[str, Tensor]]:
    with promoted_float32():
        return reference(make_model(MODEL), make_batch(ROWS * MICRO_BATCHES))


def hash_of(loss: Tensor, gradients: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(loss.detach().numpy().tobytes())
    for name in sorted(gradients):
        digest.update(gradients[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def step(plan: Mapping[str, Any], stored: torch.dtype) -> tuple[Tensor, dict[str, Tensor], int]:
    """One step on this rank, or on all if emulated: loss, gradients, planned runs of blocks."""
    model, batch = make_model(MODEL).to(stored), make_batch(ROWS * MICRO_BATCHES)
    if plan["pp"] < EMULATED:
        parallel = ilm_compile.parallelize(model, example_inputs=EXAMPLE, **plan)
        loss = parallel.execute_schedule(batch)
        assert isinstance(loss, Tensor)
        stages, gradients = parallel.stages, parallel.full_gradients()
        return loss, gradients, planned_runs(stages, MICRO_BATCHES).total()
    program = lower(ilm_compile.partition(model, example_inputs=EXAMPLE, **plan))
    [found] = emulate(program, make_schedule(program.plan), model, [batch], max_norm=None)
    planned = planned_runs(program.stages, MICRO_BATCHES).total() * plan.get("tp", 1)
    return found.loss, found.gradients, planned


def measure_on_rank(rank: int, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row; of errors and bits on rank 0 alone."""
    with precision(torch.float64), block_runs() as runs:
        loss, gradients, planned = step(plan, torch.float64)
    found: dict[str, Any] = {"runs": runs.total(), "planned": planned}
    if rank == 0:
        errors = compare(loss, expected()[0], gradients, expected()[1])
        found |= {"loss": errors.loss, "gradient": errors.gradient, "worst": errors.worst}
    if plan["tp"] == 1:
        with precision(torch.float32):
            loss, gradients, _ = step(plan, torch.float32)
        found |= {"bits": hash_of(loss, gradients)} if rank == 0 else {}
    return found


def measure(row: Row, world: World) -> Row:
    """`row` with what its plan finds in `world`."""
    schedule, num_chunks, checkpoint, pp, tp = row.plan
    plan: dict[str, Any] = {"schedule": schedule, "num_chunks": num_chunks, "pp": pp, "tp": tp}
    plan["num_microbatches"] = MICRO_BATCHES
    with precision(torch.float64):
        asked = {str(each): each for each in CHECKPOINTS}[checkpoint]
        plan |= recompute(asked, make_model(MODEL), example_inputs=EXAMPLE, **plan)
    try:
        if pp < EMULATED:
            ranks = world.run(measure_on_rank, plan, timeout=TIMEOUT)
        else:
            ranks = [measure_on_rank(0, plan)]
    except (WorldError, ilm_compile.IlmCompileError) as error:
        return Row(*row.plan, failure=last_line(error))
    totals = {name: sum(rank[name] for rank in ranks) for name in ("runs", "planned")}
    return Row(*row.plan, **{**ranks[0], **totals})


def measure_all(done: set[tuple[str, int, str, int, int]]) -> Iterator[Row]:
    """Yield the rows that are not `done`; processes are forked with the traced graphs."""
    for stored in (torch.float64, torch.float32):
        with precision(stored):
            ilm_compile.partition(make_model(MODEL).to(stored), example_inputs=EXAMPLE)
    for pp, tp in MESHES:
        rows = [
            Row(schedule, chunks, str(checkpoint), pp, tp)
            for (schedule, chunks), checkpoint in product(SCHEDULES, CHECKPOINTS)
            if pp < EMULATED or checkpoint is True
        ]
        with World(pp * tp, method="fork") as world:
            yield from (measure(row, world) for row in rows if row.plan not in done)


def has_bits_of_1f1b(row: Row, rows: Sequence[Row]) -> bool:
    """Whether they are those of 1F1B with the same pp and recompute."""
    base = ("1f1b", 1, row.checkpoint, row.pp, row.tp)
    return row.bits in {other.bits for other in rows if other.plan == base}


def summary(rows: Sequence[Row]) -> str:
    """Return the largest errors of each schedule in Markdown, and what is not equal."""
    lines = []
    for schedule, chunks in dict.fromkeys((row.schedule, row.num_chunks) for row in rows):
        these = [row for row in rows if (row.schedule, row.num_chunks) == (schedule, chunks)]
        pure = [row for row in these if row.tp == 1]
        same = sum(has_bits_of_1f1b(row, rows) for row in pure)
        errors = (f"{max(getattr(r, name) for r in these):.0e}" for name in ("loss", "gradient"))
        counts = (chunks, len(these), sum(row.is_equal for row in these))
        lines.append((schedule, *counts, *errors, f"{same} of {len(pure)}"))
    headings = ("schedule", "chunks", "plans", "equal", "loss", "gradients", "bits of 1F1B")
    wrong = (f"{_name(row)}: {row}" for row in rows if not row.is_equal)
    return "\n".join([markdown(headings, lines), *wrong])


def _name(row: Row) -> str:
    return " ".join(map(str, row.plan))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("schedule_equality", __doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "schedule_equality.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row for saved in read_rows(options.output) if not (row := Row(**saved)).failure]
    found = measure_all({row.plan for row in rows})
    keep_measuring(options.output, rows, found, _name, micro_batches=MICRO_BATCHES)
    print(summary(rows))
    return 0 if all(row.is_equal for row in rows) else 1


if __name__ == "__main__":
    # What ranks are sent is pickled under the name of its module, which must not be "__main__".
    from benchmarks.schedule_equality import main as run

    sys.exit(run())

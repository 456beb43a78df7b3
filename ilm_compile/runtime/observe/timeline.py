"""Measures the pipeline of one real step, to be drawn below the one that was planned."""

from __future__ import annotations

import platform
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from ilm_compile.files import write_text
from ilm_compile.runtime.agree import exchange
from ilm_compile.runtime.hooks import Hook
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.metrics import StepMetrics
from ilm_compile.runtime.observe.phases import PhaseWatch, named
from ilm_compile.runtime.observe.places import rank_words
from ilm_compile.runtime.observe.timeline_picture import Row, compute_rows, draw_timelines
from ilm_compile.runtime.trainer import Trainer
from ilm_compile.schedule import Action


class PipelineTimeline(Hook):
    """Records step number `step` and draws it into ``pipeline-step-N.svg`` in `folder`.

    Drawn are the ranks that are the first of their pipeline stage's dp and tp ranks, up to the end
    of the optimizer's step. The step is timed action by action, on CUDA waiting for each, and takes
    longer for it.
    """

    def __init__(self, folder: str | Path, *, step: int = 4) -> None:
        self._folder = Path(folder)
        self._step = step
        self._origin = 0.0
        self._watch: PhaseWatch | None = None

    def on_step_start(self, trainer: Trainer, step: int) -> None:
        if step != self._step:
            return
        trainer.parallel.executor.record_timeline = True
        self._origin = common_origin(trainer.parallel.mesh)
        self._watch = PhaseWatch(trainer.parallel.mesh.device)
        self._watch.start()

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if self._watch is None:
            return
        parallel = trainer.parallel
        phases = self._stop(trainer)
        spans = gather_spans(parallel.executor.timeline, self._origin, trainer)
        rows = gather_rows(phases, self._origin, parallel.mesh)
        if parallel.mesh.rank == 0:
            title = f"step {metrics.step}, {parallel.schedule.name}"
            text = draw_timelines(
                parallel.schedule, spans, title=title, ranks=rows, dp=parallel.mesh.dp.size
            )
            write_text(self._folder / f"pipeline-step-{metrics.step}.svg", text)

    def on_stop(self, trainer: Trainer) -> None:
        if self._watch is not None:
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> list[tuple[float, float]]:
        assert self._watch is not None
        watch, self._watch = self._watch, None
        watch.stop()
        trainer.parallel.executor.record_timeline = False
        return watch.spans()


def common_origin(mesh: Mesh) -> float:
    """About now by this rank's `time.perf_counter`, the same moment on all ranks. Collective.

    Clocks of different machines do not agree: there the moment is the end of a collective, which
    all ranks leave together, to a millisecond or so. Ranks of one machine share its clock.
    """
    exchange([0.0], mesh)
    rows = exchange([float(_machine()), time.perf_counter()], mesh)
    return min(now for machine, now in rows if machine == rows[mesh.rank][0])


def _machine() -> int:
    """A number for what shares a clock: a running kernel, or a host name where it has no name."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        name = platform.node().encode()
    return zlib.crc32(name)


def gather_spans(
    recorded: Sequence[tuple[str, float, float]], origin: float, trainer: Trainer
) -> dict[Action, tuple[float, float]]:
    """The spans, in seconds since `origin`, of all pipeline ranks' compute actions. Collective."""
    mesh, schedule = trainer.parallel.mesh, trainer.parallel.schedule
    rows = compute_rows(schedule)
    known = {text: (start - origin, end - origin) for text, start, end in recorded}
    own = [time for action in rows[mesh.pp.rank] for time in known[str(action)]]
    length = 2 * max(len(row) for row in rows)
    table = exchange(own + [0.0] * (length - len(own)), mesh)
    spans: dict[Action, tuple[float, float]] = {}
    for rank, row in enumerate(rows):
        times = table[mesh.rank_at(rank, 0, 0)]
        spans |= {a: (times[2 * i], times[2 * i + 1]) for i, a in enumerate(row)}
    return spans


def gather_rows(phases: Sequence[tuple[float, float]], origin: float, mesh: Mesh) -> list[Row]:
    """What each pipeline rank is called, and its phases in seconds since `origin`. Collective."""
    own = [time - origin if end > start else 0.0 for start, end in phases for time in (start, end)]
    table = exchange(own, mesh)
    rows = []
    for pp_rank in range(mesh.pp.size):
        times = table[mesh.rank_at(pp_rank, 0, 0)]
        spans = list(zip(times[::2], times[1::2], strict=True))
        rows.append(Row(rank_words(mesh, pp_rank), named(spans)))
    return rows

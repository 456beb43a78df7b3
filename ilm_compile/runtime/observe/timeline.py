"""The pipeline of one real step, drawn below the one that was planned."""

from __future__ import annotations

import platform
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from ilm_compile.files import write_text
from ilm_compile.runtime.agree import exchange
from ilm_compile.runtime.hooks import Hook
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.metrics import StepMetrics
from ilm_compile.runtime.observe.svg import (
    BACKWARD,
    FORWARD,
    INK,
    LINE,
    MUTED,
    Picture,
    text_width,
    ticks,
)
from ilm_compile.runtime.trainer import Trainer
from ilm_compile.schedule import Action, Kind, Schedule
from ilm_compile.schedule.timeline import timeline

Spans = Mapping[Action, tuple[float, float]]  # start and end of each compute action

LEFT, RIGHT, ROW, GAP = 70.0, 20.0, 24.0, 6.0
WIDTH = 1200.0
_DARK = {FORWARD[0], FORWARD[2], BACKWARD[2]}
_COLORS = {Kind.F: FORWARD, Kind.B: BACKWARD}


class PipelineTimeline(Hook):
    """Records step number `step` and draws it into ``pipeline-step-N.svg`` in `folder`.

    Drawn are the ranks that are the first of their pipeline stage's dp and tp ranks. The step is
    timed action by action, on CUDA waiting for each, and takes longer for it.
    """

    def __init__(self, folder: str | Path, *, step: int = 4) -> None:
        self._folder = Path(folder)
        self._step = step
        self._origin = 0.0

    def on_step_start(self, trainer: Trainer, step: int) -> None:
        if step != self._step:
            return
        trainer.parallel.executor.record_timeline = True
        self._origin = common_origin(trainer.parallel.mesh)

    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        if metrics.step != self._step:
            return
        parallel = trainer.parallel
        parallel.executor.record_timeline = False
        spans = gather_spans(parallel.executor.timeline, self._origin, trainer)
        if parallel.mesh.rank == 0:
            title = f"step {metrics.step}, {parallel.schedule.name}"
            text = draw_timelines(parallel.schedule, spans, title=title)
            write_text(self._folder / f"pipeline-step-{metrics.step}.svg", text)


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


def compute_rows(schedule: Schedule) -> list[list[Action]]:
    """The forwards and backwards of each pipeline rank in their order."""
    return [[action for action in row if action.is_compute] for row in schedule.actions]


def bubble(rows: Sequence[Sequence[Action]], spans: Spans) -> float:
    """The share of all ranks' time, from the first start to the last end, without a compute."""
    every = [spans[action] for row in rows for action in row]
    whole = max(end for _, end in every) - min(start for start, _ in every)
    return 1 - sum(end - start for start, end in every) / (whole * len(rows))


def draw_timelines(schedule: Schedule, measured: Spans, *, title: str) -> str:
    """An SVG of `schedule` as planned, in forwards of one stage, above `measured`, in seconds."""
    rows = compute_rows(schedule)
    steps = timeline(rows, schedule.num_stages)
    planned = {action: (float(s.start), float(s.stop)) for action, s in steps.items()}
    panel = len(rows) * (ROW + GAP) + 66
    picture = Picture(WIDTH, 64 + 2 * panel)
    picture.text(LEFT, 26, f"Pipeline of {title}", size=16, bold=True)
    _legend(picture, LEFT, 46, schedule)
    for top, name, spans, unit in (
        (64, "planned", planned, "forwards of one stage"),
        (64 + panel, "measured", _in_ms(measured), "ms"),
    ):
        heading = f"{name}: {bubble(rows, spans):.1%} idle"
        _panel(picture, top, heading, rows, spans, unit, schedule)
    return picture.render()


def _in_ms(spans: Spans) -> Spans:
    origin = min(start for start, _ in spans.values())
    return {a: ((s - origin) * 1e3, (e - origin) * 1e3) for a, (s, e) in spans.items()}


def _panel(
    picture: Picture,
    top: float,
    heading: str,
    rows: Sequence[Sequence[Action]],
    spans: Spans,
    unit: str,
    schedule: Schedule,
) -> None:
    limit = max(end for _, end in spans.values())
    scale = (WIDTH - LEFT - RIGHT) / limit
    bottom = top + 24 + len(rows) * (ROW + GAP)
    picture.text(LEFT, top + 14, heading, size=13, bold=True)
    for tick in ticks(limit, 10):
        x = LEFT + tick * scale
        picture.line(x, top + 22, x, bottom)
        picture.text(x, bottom + 15, f"{tick:g}", size=11, fill=MUTED, anchor="middle")
    widths = [(end - start) * scale for start, end in spans.values()]
    is_wide = median(widths) > text_width(str(max(spans, key=lambda a: len(str(a)))), 11)
    picture.text(WIDTH - RIGHT, bottom + 29, unit, size=11, fill=MUTED, anchor="end")
    for rank, row in enumerate(rows):
        y = top + 24 + rank * (ROW + GAP)
        picture.text(LEFT - 10, y + 16, f"rank {rank}", anchor="end")
        picture.line(LEFT, y + ROW + GAP / 2, WIDTH - RIGHT, y + ROW + GAP / 2, stroke=LINE)
        for action in row:
            start, end = spans[action]
            tip = f"{action}: {start:.3g} to {end:.3g} {unit}"
            label = str(action) if is_wide else str(action.microbatch)
            x, width = LEFT + start * scale, (end - start) * scale
            _box(picture, x, y, width, _color(action, schedule), label, tip)


def _box(
    picture: Picture, x: float, y: float, width: float, color: str, label: str, tip: str
) -> None:
    picture.rect(x, y, max(width - 1, 0.5), ROW, color, title=tip)
    if text_width(label, 11) + 2 <= width:
        ink = "#ffffff" if color in _DARK else INK
        picture.text(x + width / 2, y + 16, label, size=11, fill=ink, anchor="middle")


def _color(action: Action, schedule: Schedule) -> str:
    shades = _COLORS.get(action.kind, BACKWARD)
    return shades[(action.stage // schedule.num_ranks) % len(shades)]


def _legend(picture: Picture, x: float, y: float, schedule: Schedule) -> None:
    num_chunks = -(-schedule.num_stages // schedule.num_ranks)
    entries = [
        (shades[chunk % len(shades)], f"{word}{f', chunk {chunk}' if num_chunks > 1 else ''}")
        for word, shades in (("forward", FORWARD), ("backward", BACKWARD))
        for chunk in range(num_chunks)
    ]
    for color, text in entries:
        picture.rect(x, y - 10, 12, 12, color)
        picture.text(x + 17, y, text, fill=MUTED)
        x += 17 + text_width(text, 12) + 18
    picture.text(
        x, y, "2F0: stage 2, forward, micro-batch 0; a number alone: the micro-batch", fill=MUTED
    )

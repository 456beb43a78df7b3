"""The picture of a pipeline's step: as planned, as simulated, and as measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from ilm_compile.runtime.observe.phases import PHASES
from ilm_compile.runtime.observe.svg import (
    BACKWARD,
    FORWARD,
    INK,
    LINE,
    MUTED,
    WEIGHTS,
    Picture,
    text_width,
    ticks,
)
from ilm_compile.schedule import Action, Kind, Schedule, StageTimes, simulate
from ilm_compile.schedule.timeline import timeline

Spans = Mapping[Action, tuple[float, float]]  # start and end of each compute action

RIGHT, ROW, GAP, TOP = 20.0, 24.0, 6.0, 84.0
WIDTH, WIDEST = 1200.0, 4000.0
SIZE, SMALL = 11.0, 8.5  # of labels
_DARK = {FORWARD[0], FORWARD[2], BACKWARD[2], WEIGHTS[2]} | {color for _, color in PHASES.values()}
# What a kind is called, and the shades of its chunks.
_LOOKS = {
    Kind.F: ("forward", FORWARD),
    Kind.B: ("backward", BACKWARD),
    Kind.W: ("weights", WEIGHTS),
}
_REDUCTION = PHASES["gradients"][1]


@dataclass(frozen=True, slots=True)
class Row:
    """A pipeline rank: what it is called, and when it did what after its schedule, in seconds."""

    name: str
    phases: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def compute_rows(schedule: Schedule) -> list[list[Action]]:
    """The computes of each pipeline rank in their order."""
    return [[action for action in row if action.is_compute] for row in schedule.actions]


def bubble(rows: Sequence[Sequence[Action]], spans: Spans) -> float:
    """The share of all ranks' time, from the first start to the last end, without a compute."""
    every = [spans[action] for row in rows for action in row]
    whole = max(end for _, end in every) - min(start for start, _ in every)
    return 1 - sum(end - start for start, end in every) / (whole * len(rows))


def simulated(schedule: Schedule, measured: Spans) -> dict[Action, tuple[float, float]]:
    """When each compute would run if all of its stage and kind took the median of those measured.

    From the first start measured. Messages take no time, other than they do in fact.
    """
    lengths: dict[tuple[int, Kind], list[float]] = {}
    for action, (start, end) in measured.items():
        lengths.setdefault((action.stage, action.kind), []).append(end - start)
    forward, backward, weight = (
        [median(lengths.get((stage, kind), [0.0])) for stage in range(schedule.num_stages)]
        for kind in (Kind.F, Kind.B, Kind.W)
    )
    times = [
        StageTimes(forward=f, backward=b, weight=w)
        for f, b, w in zip(forward, backward, weight, strict=True)
    ]
    spans, first = simulate(schedule, times).spans, min(start for start, _ in measured.values())
    return {a: (first + spans[a].start, first + spans[a].stop) for a in measured}


def draw_timelines(
    schedule: Schedule,
    measured: Spans,
    *,
    title: str,
    ranks: Sequence[Row] | None = None,
    dp: int = 1,
) -> str:
    """An SVG of `schedule` as planned, in forwards of one stage, above `measured`, in seconds.

    In between, on the scale of what was measured, is what `simulated` makes of that.

    dp: data-parallel ranks; above 1 the last backward of each stage is marked, which reduces its
    gradients, or the last weight part, after which they are. As wide as it takes to write the
    micro-batch into a planned forward.
    """
    rows = compute_rows(schedule)
    ranks = ranks or [Row(f"rank {rank}") for rank in range(len(rows))]
    steps = timeline(rows, schedule.num_stages)
    planned = {action: (float(s.start), float(s.stop)) for action, s in steps.items()}
    left = 24 + max(text_width(text, 12) for rank in ranks for text in (rank.name, "stages 0"))
    longest = max(end for _, end in planned.values())
    needed = longest * (text_width(str(schedule.num_microbatches - 1), SMALL) + 3)
    width = left + RIGHT + min(max(WIDTH - left - RIGHT, needed), WIDEST)
    panel = len(rows) * (ROW + GAP) + 66
    picture = Picture(width, TOP + 3 * panel)
    picture.text(left, 26, f"Pipeline of {title}", size=16, bold=True)
    _legend(picture, left, 46, schedule, ranks, dp)
    reduces = frozenset(_last_gradients(rows)) if dp > 1 else frozenset[Action]()
    as_simulated, names = simulated(schedule, measured), [Row(rank.name) for rank in ranks]
    first = min(start for start, _ in measured.values())
    ends = [end for spans in (measured, as_simulated) for _, end in spans.values()]
    ends += [end for rank in ranks for _, end in rank.phases.values()]
    panels: list[tuple[str, Spans, str, Sequence[Row]]] = [
        ("planned", planned, "forwards of one stage", names),
        ("simulated from the medians measured", as_simulated, "ms, simulated", names),
        ("measured", measured, "ms", ranks),
    ]
    for number, (name, spans, unit, shown) in enumerate(panels):
        is_planned = spans is planned
        _Panel(
            picture, schedule, left, TOP + number * panel, unit,
            origin=0.0 if is_planned else first, factor=1.0 if is_planned else 1e3, reduces=reduces,
        ).draw(
            f"{name}: {bubble(rows, spans):.1%} idle",
            rows,
            spans,
            shown,
            until=longest if is_planned else max(ends),
        )  # fmt: skip
    return picture.render()


def _last_gradients(rows: Sequence[Sequence[Action]]) -> Iterable[Action]:
    """The last action of each stage that adds to gradients."""
    gradients = [action for row in rows for action in row if action.kind is not Kind.F]
    return {action.stage: action for action in gradients}.values()


@dataclass
class _Panel:
    """One of the pictures. Times are multiplied by `factor`, from `origin` on."""

    picture: Picture
    schedule: Schedule
    left: float
    top: float
    unit: str
    origin: float
    factor: float
    reduces: frozenset[Action]
    scale: float = 1.0

    def draw(
        self,
        heading: str,
        rows: Sequence[Sequence[Action]],
        spans: Spans,
        ranks: Sequence[Row],
        *,
        until: float,
    ) -> None:
        picture, right = self.picture, self.picture.width - RIGHT
        limit = (until - self.origin) * self.factor
        self.scale = (right - self.left) / limit
        bottom = self.top + 24 + len(rows) * (ROW + GAP)
        picture.text(self.left, self.top + 14, heading, size=13, bold=True)
        for tick in ticks(limit, 10):
            x = self.left + tick * self.scale
            picture.line(x, self.top + 22, x, bottom)
            picture.text(x, bottom + 15, f"{tick:g}", size=11, fill=MUTED, anchor="middle")
        picture.text(right, bottom + 29, self.unit, size=11, fill=MUTED, anchor="end")
        wide = self._kinds_with_room(spans)
        for number, (row, rank) in enumerate(zip(rows, ranks, strict=True)):
            y = self.top + 24 + number * (ROW + GAP)
            picture.line(self.left, y + ROW + GAP / 2, right, y + ROW + GAP / 2, stroke=LINE)
            stages = sorted({action.stage for action in row})
            words = f"stage{'s'[: len(stages) > 1]} {', '.join(map(str, stages))}"
            picture.text(self.left - 10, y + 11, rank.name, anchor="end")
            picture.text(self.left - 10, y + 22, words, size=10, fill=MUTED, anchor="end")
            for action in row:
                labels = [(str(action.microbatch), SIZE), (str(action.microbatch), SMALL)]
                labels = [(str(action), SIZE)] * (action.kind in wide) + labels
                color = _color(action, self.schedule)
                x, width = self._box(y, spans[action], color, str(action), labels)
                if action in self.reduces:
                    picture.rect(x, y + ROW - 4, width, 4, _REDUCTION)
            for name, span in rank.phases.items():
                word, color = PHASES[name]
                self._box(y, span, color, word, [(word, SIZE), (word, SMALL)])

    def _kinds_with_room(self, spans: Spans) -> set[Kind]:
        """The kinds of action whose boxes are mostly wide enough for the whole label."""
        needed = max(text_width(str(action), SIZE) for action in spans) + 2
        widths: dict[Kind, list[float]] = {}
        for action, (start, end) in spans.items():
            widths.setdefault(action.kind, []).append((end - start) * self.factor * self.scale)
        return {kind for kind, found in widths.items() if median(found) >= needed}

    def _box(
        self,
        y: float,
        span: tuple[float, float],
        color: str,
        name: str,
        labels: Sequence[tuple[str, float]],
    ) -> tuple[float, float]:
        """Draw it with the first label that has room; where it begins, and its width."""
        start, end = ((time - self.origin) * self.factor for time in span)
        x, width = self.left + start * self.scale, (end - start) * self.scale
        drawn = max(width - 1, 0.5)
        tip = f"{name}: {start:.3g} to {end:.3g} {self.unit}"
        self.picture.rect(x, y, drawn, ROW, color, title=tip)
        for label, size in labels:
            if text_width(label, size) + 2 <= width:
                ink = "#ffffff" if color in _DARK else INK
                middle = x + width / 2
                self.picture.text(middle, y + 16, label, size=size, fill=ink, anchor="middle")
                break
        return x, drawn


def _color(action: Action, schedule: Schedule) -> str:
    shades = _LOOKS[action.kind][1]
    return shades[(action.stage // schedule.num_ranks) % len(shades)]


def _legend(
    picture: Picture, left: float, y: float, schedule: Schedule, ranks: Sequence[Row], dp: int
) -> None:
    num_chunks = -(-schedule.num_stages // schedule.num_ranks)
    entries = [
        (shades[chunk % len(shades)], f"{word}{f', chunk {chunk}' if num_chunks > 1 else ''}")
        for kind, (word, shades) in _LOOKS.items()
        if kind is not Kind.W or schedule.splits_backwards
        for chunk in range(num_chunks)
    ]
    x = picture.legend(left, y, entries)
    words = "2F0: stage 2, forward, micro-batch 0; a number alone: the micro-batch"
    if x + text_width(words, 12) > picture.width:
        words = words.partition(";")[0]
    picture.text(x, y, words, fill=MUTED)
    seen = {name for rank in ranks for name in rank.phases}
    after = [(color, word) for name, (word, color) in PHASES.items() if name in seen]
    x = picture.legend(left, y + 20, after)
    if dp > 1:
        picture.legend(x, y + 20, [(_REDUCTION, "below an action: it reduces over dp")])

"""The pictures of a report, as SVG: candidates by time and memory, a step, its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from ilm_compile.cost.hardware import GIB
from ilm_compile.planner.candidate import Candidate
from ilm_compile.planner.simulated import SimulatedStep
from ilm_compile.runtime.observe.svg import (
    BACKWARD,
    FORWARD,
    INK,
    LINE,
    MUTED,
    WEIGHTS,
    Picture,
    ticks,
)
from ilm_compile.schedule import Kind

WIDTH, LEFT, RIGHT = 900.0, 76.0, 20.0
_COLORS = {Kind.F: FORWARD, Kind.B: BACKWARD, Kind.W: WEIGHTS}
_BEST, _CAP = "#b03a2e", "#b03a2e"
MOST = 2000  # points of a scatter
LABELS = 5  # of ranks on a line


def scatter(candidates: Sequence[Candidate], memory_bytes: float) -> str:
    """Return the candidates, the fastest of them first, by step time and memory, and the cap."""
    height, top, bottom = 380.0, 20.0, 44.0
    shown = candidates[:MOST]
    longest = max(c.time.total for c in shown)
    most = max(memory_bytes, *(c.memory.total for c in shown)) / GIB
    picture = Picture(WIDTH, height)
    x = _scale(0.0, longest * 1.05, LEFT, WIDTH - RIGHT)
    y = _scale(0.0, most * 1.05, height - bottom, top)
    _axes(picture, x, y, longest * 1.05, most * 1.05, "seconds of a step", "GiB of a rank")
    cap = y(memory_bytes / GIB)
    picture.line(LEFT, cap, WIDTH - RIGHT, cap, stroke=_CAP)
    picture.text(WIDTH - RIGHT, cap - 4, "what a rank may fill", fill=_CAP, size=11, anchor="end")
    for index, candidate in reversed(list(enumerate(shown))):
        at = x(candidate.time.total), y(candidate.memory.total / GIB)
        figures = f"{candidate.time.total:.3f} s, {candidate.memory.total / GIB:.1f} GiB"
        size, color = (9.0, _BEST) if index == 0 else (5.0, FORWARD[0])
        tip = f"{candidate.name}: {figures}"
        picture.rect(at[0] - size / 2, at[1] - size / 2, size, size, color, title=tip)
    return picture.render()


def step_picture(step: SimulatedStep) -> str:
    """Return when each pipeline rank computes what, in milliseconds."""
    row, gap, top = 22.0, 6.0, 34.0
    ranks = step.simulation.schedule.actions
    height = top + len(ranks) * (row + gap) + 40
    picture = Picture(WIDTH, height)
    x = _scale(0.0, step.seconds, LEFT, WIDTH - RIGHT)
    place = LEFT
    for kind, name in ((Kind.F, "forward"), (Kind.B, "backward"), (Kind.W, "weight gradients")):
        picture.rect(place, 10, 12, 12, _COLORS[kind][0])
        picture.text(place + 17, 20, name, size=11)
        place += 120
    for rank, actions in enumerate(ranks):
        y = top + rank * (row + gap)
        picture.text(LEFT - 8, y + 15, f"rank {rank}", size=11, anchor="end")
        picture.rect(LEFT, y, WIDTH - LEFT - RIGHT, row, "#f4f6f8")
        for action in actions:
            if action.is_compute:
                span = step.simulation.spans[action]
                color = _COLORS[action.kind][action.microbatch % 2]
                tip = f"{action}: {(span.stop - span.start) * 1e3:.3f} ms"
                picture.rect(x(span.start), y, x(span.stop) - x(span.start), row, color, title=tip)
    base = top + len(ranks) * (row + gap) + 4
    for tick in ticks(step.seconds * 1e3):
        at = x(tick / 1e3)
        picture.line(at, top, at, base)
        picture.text(at, base + 14, f"{tick:g}", size=11, fill=MUTED, anchor="middle")
    picture.text(WIDTH - RIGHT, base + 30, "ms", size=11, fill=MUTED, anchor="end")
    return picture.render()


def memory_picture(step: SimulatedStep, memory_bytes: float) -> str:
    """Return what each pipeline rank holds over time, and what it may fill."""
    height, top, bottom, row = 300.0, 20.0, 44.0, 18.0
    ranks = range(len(step.static))
    most = max(memory_bytes, *(step.peak(rank) for rank in ranks)) / GIB * 1.05
    picture = Picture(WIDTH, height + row * (ranks[-1] // LABELS + 2))
    x = _scale(0.0, step.seconds, LEFT, WIDTH - RIGHT)
    y = _scale(0.0, most, height - bottom, top)
    _axes(picture, x, y, step.seconds, most, "seconds", "GiB")
    cap = y(memory_bytes / GIB)
    picture.line(LEFT, cap, WIDTH - RIGHT, cap, stroke=_CAP)
    picture.text(WIDTH - RIGHT, cap - 4, "what a rank may fill", fill=_CAP, size=11, anchor="end")
    shades = [*FORWARD[:3], *BACKWARD[:3], *WEIGHTS[:3]]
    for rank in ranks:
        color = shades[rank % len(shades)]
        points = [*step.memory(rank), (step.seconds, step.memory(rank)[-1][1])]
        for (start, held), (stop, after) in pairwise(points):
            picture.line(x(start), y(held / GIB), x(stop), y(held / GIB), stroke=color)
            picture.line(x(stop), y(held / GIB), x(stop), y(after / GIB), stroke=color)
        line, column = divmod(rank, LABELS)
        label = f"rank {rank}: peak {step.peak(rank) / GIB:.2f} GiB"
        picture.legend(LEFT + 160 * column, height + row * (line + 1), [(color, label)])
    return picture.render()


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    factor = (stop - start) / (high - low) if high > low else 0.0
    return lambda value: start + (value - low) * factor


def _axes(
    picture: Picture,
    x: Callable[[float], float],
    y: Callable[[float], float],
    longest: float,
    most: float,
    of_x: str,
    of_y: str,
) -> None:
    for tick in ticks(longest):
        picture.line(x(tick), y(0), x(tick), y(most), stroke=LINE)
        picture.text(x(tick), y(0) + 15, f"{tick:g}", size=11, fill=MUTED, anchor="middle")
    for tick in ticks(most):
        picture.line(x(0), y(tick), x(longest), y(tick), stroke=LINE)
        picture.text(x(0) - 6, y(tick) + 4, f"{tick:g}", size=11, fill=MUTED, anchor="end")
    picture.text(x(longest), y(0) + 32, of_x, size=11, fill=INK, anchor="end")
    picture.text(x(0) - 6, y(most) - 6, of_y, size=11, fill=INK, anchor="start")

"""The picture of a memory breakdown: stacked bars as SVG in one HTML file, with its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from html import escape

from ilm_compile.runtime.observe.svg import INK, LINE, MUTED, Picture, ticks

Breakdown = dict[str, Counter[str]]  # bytes of each kind, by module or rank

# Kind -> its colour; in the order in which the bars stack them.
COLORS = {
    "parameters": "#4878a8",
    "gradients": "#8fb4d4",
    "optimizer": "#6b5b95",
    "activations": "#e08a3c",
}
KINDS = tuple(COLORS)
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
WIDTH, LEFT, RIGHT, ROW, GAP = 1000.0, 200.0, 130.0, 18.0, 6.0
PEAK, PALE = "rest of the allocator's peak", "#e3e0ea"

_STYLE = (
    "body{font-family:Helvetica,Arial,sans-serif;color:#1f2933;margin:24px;max-width:1000px}"
    "svg{max-width:100%;height:auto}table{border-collapse:collapse;font-size:13px}"
    "th,td{padding:3px 14px;text-align:right;border-bottom:1px solid #d9dee4}"
    "th:first-child,td:first-child{text-align:left;padding-left:0}"
    "tr:last-child td{font-weight:bold}"
)


def draw_memory(
    rank: str,
    ranks: Breakdown,
    modules: Breakdown,
    *,
    step: int,
    peaks: Mapping[str, int] | None = None,
) -> str:
    """An HTML page that needs no other file: `ranks` compared, then the `modules` of `rank`.

    peaks: the most bytes that the allocator of each rank had given out in the step, where there is
    one that tells.
    """
    title = f"Memory of {rank} in step {step}"
    own = sum((Counter(sizes) for sizes in modules.values()), Counter[str]())
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}"
        f"</title><style>{_STYLE}</style></head><body>\n"
        f"{_bars(title, rank, ranks, modules, peaks or {})}"
        f"{_table(modules, own)}"
        "<p>Parameters, gradients and optimizer state: kept between steps. Activations: kept by "
        "forwards for their backwards, at the fullest moment of the schedule.</p>\n"
        f"{_PEAK_WORDS if peaks else ''}</body></html>\n"
    )


_PEAK_WORDS = (
    "<p>The rest of the allocator's peak: whole parameters and gradients while data parallelism "
    "has them gathered, what an op needs while it runs, and tensors of others in this process.</p>"
    "\n"
)


def _bars(
    title: str, rank: str, ranks: Breakdown, modules: Breakdown, peaks: Mapping[str, int]
) -> str:
    heights = [44 + len(rows) * (ROW + GAP) + 26 for rows in (ranks, modules)]
    picture = Picture(WIDTH, 56 + sum(heights))
    picture.text(0, 22, title, size=17, bold=True)
    kinds = COLORS | ({PEAK: PALE} if peaks else {})
    picture.legend(0, 46, ((color, kind) for kind, color in kinds.items()))
    _panel(picture, 62, "pipeline ranks", ranks, peaks, bold=rank)
    _panel(picture, 62 + heights[0], f"modules of {rank}", modules, {}, bold="")
    return picture.render()


def _panel(
    picture: Picture,
    top: float,
    heading: str,
    rows: Breakdown,
    peaks: Mapping[str, int],
    *,
    bold: str,
) -> None:
    limit = (
        max([*(sum(sizes.values()) for sizes in rows.values()), *peaks.values()], default=0) or 1
    )
    unit, size = _unit(limit)
    scale = (WIDTH - LEFT - RIGHT) / limit
    bottom = top + 28 + len(rows) * (ROW + GAP)
    picture.text(0, top + 18, heading, size=13, bold=True)
    for tick in ticks(limit / size):
        x = LEFT + tick * size * scale
        picture.line(x, top + 26, x, bottom, stroke=LINE)
        picture.text(x, bottom + 14, f"{tick:g}", size=11, fill=MUTED, anchor="middle")
    picture.text(WIDTH, bottom + 14, unit, size=11, fill=MUTED, anchor="end")
    for position, (name, sizes) in enumerate(rows.items()):
        y = top + 28 + position * (ROW + GAP)
        picture.text(LEFT - 10, y + 13, _short(name), anchor="end", bold=name == bold)
        x = LEFT
        for kind, color in COLORS.items():
            if width := sizes[kind] * scale:
                tip = f"{name}, {kind}: {format_bytes(sizes[kind])}"
                picture.rect(x, y, width, ROW, color, title=tip)
                x += width
        words, peak = format_bytes(sum(sizes.values())), peaks.get(name)
        if peak is not None:
            end = LEFT + peak * scale
            words = f"{words} of {format_bytes(peak)}"
            tip = f"{name}, allocator's peak: {format_bytes(peak)}"
            if end > x:
                picture.rect(x, y, end - x, ROW, PALE, title=tip)
            picture.line(end, y - 2, end, y + ROW + 2, stroke=INK)
            x = max(x, end)
        picture.text(x + 6, y + 13, words, size=11, fill=INK)


def _table(modules: Breakdown, own: Mapping[str, int]) -> str:
    head = "".join(f"<th>{kind}</th>" for kind in ("module", *KINDS, "total"))
    rows = [*modules.items(), ("total", own)]
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{format_bytes(sizes.get(kind, 0))}</td>" for kind in KINDS)
        + f"<td>{format_bytes(sum(sizes.values()))}</td></tr>\n"
        for name, sizes in rows
    )
    return f"<table><tr>{head}</tr>\n{body}</table>\n"


def format_bytes(num_bytes: int) -> str:
    """Bytes with a unit, to three digits."""
    unit, size = _unit(num_bytes)
    value = num_bytes / size
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def _unit(num_bytes: float) -> tuple[str, int]:
    return next(((unit, size) for unit, size in _UNITS if num_bytes >= size), ("B", 1))


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"…{name[-27:]}"

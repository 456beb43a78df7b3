"""Pictures as SVG text: rectangles and words, nothing that needs a script or another file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from html import escape

FONT = "font-family='Helvetica, Arial, sans-serif'"
INK, MUTED, LINE = "#1f2933", "#66727f", "#d9dee4"
# Distinguishable in grey and for the colour-blind: Okabe and Ito's blue and orange, toned down.
FORWARD = ("#4878a8", "#8fb4d4", "#2d4f73", "#b9d3e8")
BACKWARD = ("#e08a3c", "#f2bd8b", "#a85f1d", "#f8dabb")
WEIGHTS = ("#6aa56a", "#a9cfa9", "#3f733f", "#cfe5cf")
# Average width of a character of these fonts, as a share of its size; measured on digits.
_CHARACTER = 0.58


@dataclass(slots=True)
class Picture:
    """An SVG of `width` x `height` units, on white."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, *, title: str = ""
    ) -> None:
        """A rectangle; `title` shows when the pointer rests on it."""
        tip = f"<title>{escape(title)}</title>" if title else ""
        self.parts.append(
            f"<rect x='{x:.2f}' y='{y:.2f}' width='{max(width, 0.4):.2f}' height='{height:.2f}' "
            f"fill='{fill}'>{tip}</rect>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        fill: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """A line of text whose baseline is at `y`. anchor: "start", "middle" or "end"."""
        weight = " font-weight='bold'" if bold else ""
        self.parts.append(
            f"<text x='{x:.2f}' y='{y:.2f}' font-size='{size:g}' fill='{fill}' "
            f"text-anchor='{anchor}'{weight}>{escape(text)}</text>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, *, stroke: str = LINE) -> None:
        self.parts.append(
            f"<line x1='{x1:.2f}' y1='{y1:.2f}' x2='{x2:.2f}' y2='{y2:.2f}' stroke='{stroke}'/>"
        )

    def legend(self, x: float, y: float, entries: Iterable[tuple[str, str]]) -> float:
        """Squares of colours, each with its words, from left to right; where the last one ends."""
        for color, words in entries:
            self.rect(x, y - 10, 12, 12, color)
            self.text(x + 17, y, words, fill=MUTED)
            x += 17 + text_width(words, 12) + 18
        return x

    def render(self) -> str:
        """The SVG."""
        box = f"0 0 {self.width:g} {self.height:g}"
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='{box}' width='{self.width:g}' "
            f"height='{self.height:g}' {FONT}>\n"
            f"<rect width='{self.width:g}' height='{self.height:g}' fill='#ffffff'/>\n"
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def text_width(text: str, size: float) -> float:
    """About how wide a line of text will be."""
    return _CHARACTER * size * len(text)


def ticks(limit: float, count: int = 6) -> list[float]:
    """Round numbers from 0 to at most `limit`, about `count` of them."""
    if limit <= 0:
        return [0.0]
    step = _round_step(limit / count)
    return [i * step for i in range(int(limit / step + 1e-9) + 1)]


def _round_step(step: float) -> float:
    power = 1.0
    while power > step:
        power /= 10
    while power * 10 <= step:
        power *= 10
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)

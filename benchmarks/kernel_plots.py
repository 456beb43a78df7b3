"""Curves of bandwidth: GB/s against rows, for each hidden size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ilm_compile.files import whole_file

OURS = "ilm"
# A peer has its colour and mark in every picture.
STYLES: dict[str, tuple[str, str]] = {
    OURS: ("#c0392b", "o"),
    "eager torch": ("#7f8c8d", "v"),
    "torch.compile": ("#e08a3c", "s"),
    "Liger": ("#4878a8", "^"),
    "flash-attn": ("#6aa84f", "D"),
    "QuACK": ("#8e5ea2", "P"),
}
OTHER = ("black", "x")


def plot_op(rows: Sequence[dict[str, Any]], copy: float, title: str, path: Path) -> None:
    """A panel for each hidden size and direction; the copy's GB/s as a dashed line.

    rows: of one op, as `benchmarks.gpu.bandwidth` writes them.
    """
    sizes = sorted({row["hidden"] for row in rows})
    directions = [d for d in ("forward", "backward") if any(r["direction"] == d for r in rows)]
    figure = Figure(figsize=(1.2 + 2.6 * len(sizes), 0.9 + 2.7 * len(directions)))
    figure.set_layout_engine("constrained")
    panels = figure.subplots(len(directions), len(sizes), sharex=True, sharey=True, squeeze=False)
    for across, direction in zip(panels, directions, strict=True):
        for axis, size in zip(across, sizes, strict=True):
            shown = [r for r in rows if r["direction"] == direction and r["hidden"] == size]
            _draw(axis, sorted(shown, key=lambda row: row["rows"]), copy)
            width = next((r["width"] for r in shown if r["width"] != size), None)
            of_width = "" if width is None else f", width {width}"
            axis.set_title(f"{direction}, hidden {size}{of_width}", fontsize=9)
        across[0].set_ylabel("GB/s")
    for axis in panels[-1]:
        axis.set_xlabel("rows")
    panels[0][0].set_ylim(bottom=0)
    lines = {line.get_label(): line for axis in panels.flat for line in axis.get_lines()}
    figure.legend(
        handles=[*reversed(lines.values())],
        loc="outside lower center",
        ncols=len(lines),
        fontsize=9,
    )
    figure.suptitle(title, fontsize=11)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")


def _draw(axis: Any, rows: Sequence[dict[str, Any]], copy: float) -> None:
    counts = [row["rows"] for row in rows]
    present = {name for row in rows for name in row["entries"]}
    names = [name for name in STYLES if name in present] + sorted(present - set(STYLES))
    axis.axhline(copy, color="black", linestyle="--", linewidth=1, label="copy")
    for name in reversed(names):  # ours on top
        color, marker = STYLES.get(name, OTHER)
        points = [(r["rows"], r["entries"][name]["gb_per_s"]) for r in rows if name in r["entries"]]
        axis.plot(
            *zip(*points, strict=True),
            color=color,
            marker=marker,
            markersize=4,
            linewidth=2.2 if name == OURS else 1.2,
            label=name,
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [f"{n // 1024}K" if n >= 1024 else str(n) for n in counts], fontsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)

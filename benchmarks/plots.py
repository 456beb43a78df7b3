"""Pictures of a comparison of plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.comparison import Comparison, is_compute
from benchmarks.plan_run import Timeline
from ilm_compile.program.plan import Plan
from ilm_compile.runtime.mesh import RANK_ORDER
from ilm_compile.schedule import Action

MIB = 2**20
COLORS = {"F": "#4878a8", "B": "#e08a3c"}

# Title of a panel -> what its bars show.
PANELS: dict[str, Callable[[Comparison], float]] = {
    "step time (ms)": lambda row: row.step_time_s * 1e3,
    "sent per rank and step (MiB)": lambda row: row.sent_bytes / MIB,
    "peak memory per rank (MiB)": lambda row: row.peak_bytes / MIB,
    "bubble (%)": lambda row: row.bubble * 100,
}


def plot_comparison(comparisons: Sequence[Comparison], path: Path) -> None:
    """One panel of bars per figure, one bar per plan; the bubble the schedule implies as a mark."""
    names = [comparison.row.name for comparison in comparisons]
    figure = Figure(figsize=(14, 0.9 + 0.38 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (title, value) in zip(axes, PANELS.items(), strict=True):
        bars = axis.barh(names, [value(row) for row in comparisons], color=COLORS["F"])
        axis.bar_label(bars, fmt="{:.1f}", padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    expected = [row.expected_bubble * 100 for row in comparisons]
    axes[-1].plot(expected, names, "|", color="black", markersize=12, label="as the schedule says")
    axes[-1].legend(fontsize=8, loc="upper right")
    axes[0].invert_yaxis()
    _save(figure, path)


def plot_timelines(comparisons: Sequence[Comparison], path: Path) -> None:
    """The last recorded step of each pipelined plan: forwards and backwards, rank by rank."""
    pipelined = [comparison for comparison in comparisons if comparison.row.plan.pp > 1]
    if not pipelined:
        return
    figure = Figure(figsize=(12, 0.6 + 1.3 * len(pipelined)), layout="constrained")
    axes = figure.subplots(len(pipelined), squeeze=False)[:, 0]
    for axis, comparison in zip(axes, pipelined, strict=True):
        timelines = [rank.timelines[-1] for rank in comparison.ranks]
        origin = min(start for timeline in timelines for _, start, _ in timeline)
        for rank, timeline in enumerate(timelines):
            _draw_rank(axis, rank, timeline, origin)
        plan = comparison.row.plan
        names = [rank_words(n, len(timelines), plan, row) for n, row in enumerate(timelines)]
        axis.set_yticks(range(len(timelines)), names, fontsize=8)
        axis.invert_yaxis()
        title = f"{comparison.row.name}: bubble {comparison.bubble:.0%}"
        axis.set_xlim(left=0)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("ms (blue: forward, orange: backward; stage and micro-batch as text)")
    _save(figure, path)


def rank_words(rank: int, world_size: int, plan: Plan, timeline: Timeline) -> str:
    """Such as "rank 5 (pp 1, dp 0, tp 1): stages 1, 3"; an axis of one rank is left out."""
    dp = world_size // plan.ranks_per_replica
    sizes = {name: dp if name == "dp" else getattr(plan, name) for name in RANK_ORDER}
    where, rest = {}, rank
    for name, size in reversed(sizes.items()):
        rest, where[name] = divmod(rest, size)
    place = ", ".join(f"{name} {where[name]}" for name, size in sizes.items() if size > 1)
    stages = sorted({Action.parse(text).stage for text, *_ in timeline if is_compute(text)})
    word = "stages" if len(stages) > 1 else "stage"
    return f"rank {rank} ({place}): {word} {', '.join(map(str, stages))}"


def _draw_rank(axis: Any, rank: int, timeline: Timeline, origin: float) -> None:
    for action, start, end in timeline:
        if not is_compute(action):
            continue
        color = COLORS["F" if "F" in action else "B"]
        left, width = (start - origin) * 1e3, (end - start) * 1e3
        axis.barh(rank, width, left=left, color=color, edgecolor="white", height=0.8)
        axis.text(left + width / 2, rank, action, ha="center", va="center", fontsize=6)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

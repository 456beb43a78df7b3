"""The bandwidth of the fused kernels, from what a GPU run has left.

python -m benchmarks.kernels           a table of the newest benchmarks/results/gpu-*.json
python -m benchmarks.kernels FILE      of another one
python -m benchmarks.kernels --plot    curves too: a PNG of each op, beside the JSON
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, make_parser, show_table
from benchmarks.kernel_plots import plot_op
from ilm_compile.errors import IlmCompileError

Row = dict[str, Any]
SECTION = "bandwidth"


def load(path: Path | None) -> tuple[Path, dict[str, Any]]:
    """The file, by default the newest with figures of a GPU, and what it holds.

    Raises `IlmCompileError` where there is none, or no bandwidth in it.
    """
    how = "make one on a machine with a GPU: python -m benchmarks.gpu.run_all"
    if path is None:
        files = sorted(RESULTS.glob("gpu-*.json"), key=lambda path: path.stem[-10:], reverse=True)
        found = next((file for file in files if _has_figures(json.loads(file.read_text()))), None)
        if found is None:
            raise IlmCompileError(
                f"kernels: expected figures of a GPU, {RESULTS}/gpu-*.json with a section "
                f"{SECTION!r}; got {len(files)} such files, none with it; {how}"
            )
        path = found
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise IlmCompileError(f"kernels: cannot read {path}: {error}; {how}") from error
    if not _has_figures(content):
        raise IlmCompileError(
            f"kernels: expected a section {SECTION!r} with figures in {path}, got sections "
            f"{list(content.get('sections', {}))}; {how}"
        )
    return path, content


def _has_figures(content: dict[str, Any]) -> bool:
    return bool(content.get("sections", {}).get(SECTION, {}).get("result", {}).get("rows"))


def show(content: dict[str, Any]) -> None:
    """One table for each op and direction."""
    result = content["sections"][SECTION]["result"]
    facts = content["circumstances"]
    print(
        f"{facts['gpu'] or facts['cpu']}, {facts['date']}, torch {facts['torch']}; a large copy "
        f"moves {result['copy_gb_per_s']:.0f} GB/s; {result['dtype']}"
    )
    for op, rows in by_op(result["rows"]).items():
        for direction in ("forward", "backward"):
            _show(f"{op}, {direction}", [row for row in rows if row["direction"] == direction])
    for op, reasons in result["peers_left_out"].items():
        for peer, reason in reasons.items():
            print(f"left out of {op}: {peer}, {reason}")
    if result["untimed"]:
        print(f"no time for {len(result['untimed'])} sizes: {result['untimed']}")


def by_op(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each op, in the order they came."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row)
    return found


def _show(title: str, rows: Sequence[Row]) -> None:
    goals = list(rows[0]["goals"]) if rows else []
    lines = []
    for row in rows:
        ours = row["entries"]["ilm"]
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        speed = f"{ours['gb_per_s']:.0f}", f"{ours['fraction']:.1%}"
        verdicts = (row["goals"][goal] for goal in goals)
        sizes = row["hidden"], row["rows"]
        lines.append((*sizes, *speed, row["best_peer"] or "-", ratio, *verdicts))
    columns = ("hidden", "rows", "GB/s", "of copy", "best peer", "its time / ours")
    show_table(title, (*columns, *(f"{goal}?" for goal in goals)), lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("kernels", __doc__)
    parser.add_argument("json", nargs="?", type=Path, help="of benchmarks.gpu.run_all")
    parser.add_argument("--plot", action="store_true", help="write curves")
    parser.add_argument(
        "--output", type=Path, help="folder of the PNGs, that of the JSON by default"
    )
    options = parser.parse_args(arguments)
    path, content = load(options.json)
    show(content)
    if options.plot:
        result = content["sections"][SECTION]["result"]
        for op, rows in by_op(result["rows"]).items():
            png = (options.output or path.parent) / f"{path.stem}-{op}.png"
            title = f"{op}, {result['dtype']}, {content['circumstances']['gpu']}"
            plot_op(rows, result["copy_gb_per_s"], title, png)
            print(f"written to {png}")


if __name__ == "__main__":
    try:
        main()
    except IlmCompileError as error:
        raise SystemExit(str(error)) from None

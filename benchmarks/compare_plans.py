"""One model under several plans, in real processes: `python -m benchmarks.compare_plans`.

Copy a row of `PLANS` for a plan of your own, or give your rows as a JSON file of the same form.
Every plan trains the same steps on the same batches, in new processes; so does plain PyTorch, which
the losses are compared with. What the columns say:

step        median time of an optimizer step after the warm-up, of the slowest rank; with --rounds,
            of the round in which it was least
predicted   by `ilm_compile.planner.expect` for the machine of --hardware, before anything was run,
            and how far that is from the measured step
sent        bytes a rank sends in one step, by the ring algorithms, the most of any rank: every
            collective that torch runs is counted, gradients, loss and gradient norm included
memory      most bytes of tensors alive at once in a step, parameters and optimizer included, the
            most of any rank (tensors, not what the process takes from the system)
bubble      share of the pipeline's time without a forward or backward, from measured timelines;
            "expected" is what the schedule says if a backward takes two forwards
loss error  largest relative difference of a step's loss to that of plain PyTorch
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.common import launch, make_console, make_parser, save_json
from benchmarks.comparison import Comparison, compare, median_error, predict, regret, summary
from benchmarks.plan_run import RankRun, Row, Settings, run_plain
from benchmarks.plots import plot_comparison, plot_timelines
from ilm_compile.cost.hardware import Hardware, hardware_named

# The fields of `ilm_compile.Plan`, and dp, the number of data-parallel ranks.
PLANS: dict[str, dict[str, Any]] = {
    "single": {"num_microbatches": 4},
    "tp2": {"tp": 2, "num_microbatches": 4},
    "pp2 1f1b": {"pp": 2, "num_microbatches": 4},
    "pp2 gpipe": {"pp": 2, "num_microbatches": 4, "schedule": "gpipe"},
    "pp2 x 2 chunks": {
        **{"pp": 2, "num_chunks": 2, "num_microbatches": 4},
        "schedule": "interleaved_1f1b",
    },
    "pp2 checkpoint": {"pp": 2, "num_microbatches": 4, "checkpoint": True},
    "tp2 pp2": {"tp": 2, "pp": 2, "num_microbatches": 4},
    "dp2 zero1": {"dp": 2, "num_microbatches": 2, "zero": 1},
    "dp2 zero3": {"dp": 2, "num_microbatches": 2, "zero": 3},
}
PLAIN = "plain PyTorch"
PLAIN_MICROBATCHES = 4
DEFAULT_OVERRIDES = {"hidden_size": 256, "num_layers": 4}
MIB = 2**20


def compare_all(
    rows: Sequence[Row],
    settings: Settings,
    console: Console,
    *,
    hardware: Hardware | None = None,
    rounds: int = 1,
) -> list[Comparison]:
    """Plain PyTorch first, then every plan, in the order given; in every round each once.

    hardware: what steps are predicted for, if they are. Of the rounds, a plan's fastest counts.
    """
    for row in rows:
        if settings.rows % row.num_slices:
            raise SystemExit(
                f"{row.name}: expected --rows to be a multiple of its {row.num_slices} "
                f"micro-batches, got {settings.rows}"
            )
    plain: RankRun = launch(run_plain, 1, settings, math.gcd(settings.rows, PLAIN_MICROBATCHES))[0]
    found = {PLAIN: summary(Row(PLAIN, {}), settings, plain, [plain])}
    predicted = {row.name: predict(row, settings, hardware) for row in rows if hardware}
    for _ in range(rounds):
        for row in rows:
            console.print(f"running {row.name} ...", style="dim")
            this = compare(row, settings, plain)
            if row.name not in found or this.step_time_s < found[row.name].step_time_s:
                found[row.name] = replace(this, predicted_s=predicted.get(row.name))
    return [*found.values()]


def show(comparisons: Sequence[Comparison], settings: Settings, console: Console) -> None:
    """Print the table."""
    table = Table(
        title=f"{settings.preset} {settings.overrides}, {settings.rows} x {settings.seq_len} tokens"
    )
    table.add_column("plan", no_wrap=True)
    is_predicted = any(comparison.error is not None for comparison in comparisons)
    predictions = ("predicted", "error") if is_predicted else ()
    for column in ("processes", "step ms", *predictions, "tokens/s", "sent MiB", "memory MiB"):
        table.add_column(column, justify="right")
    for column in ("bubble", "expected", "loss error"):
        table.add_column(column, justify="right")
    for comparison in comparisons:
        table.add_row(
            comparison.row.name,
            str(comparison.row.num_processes),
            f"{comparison.step_time_s * 1e3:.1f}",
            *(_prediction(comparison) if is_predicted else ()),
            f"{comparison.tokens_per_second:,.0f}",
            f"{comparison.sent_bytes / MIB:.2f}",
            f"{comparison.peak_bytes / MIB:.1f}",
            f"{comparison.bubble:.1%}",
            f"{comparison.expected_bubble:.1%}",
            f"{comparison.loss_error:.1e}",
        )
    console.print(table)
    if is_predicted:
        console.print(
            f"median error of the predictions {median_error(comparisons):.1%}; the plan predicted "
            f"fastest is {regret(comparisons):.1%} slower than the fastest measured"
        )
    most = max(comparison.row.num_processes for comparison in comparisons)
    if most > (os.cpu_count() or 1):
        console.print(
            f"{most} processes share {os.cpu_count()} cores: their times say nothing of the plan",
            style="yellow",
        )


def _prediction(comparison: Comparison) -> tuple[str, str]:
    if comparison.predicted_s is None or comparison.error is None:
        return "", ""
    return f"{comparison.predicted_s * 1e3:.1f}", f"{comparison.error:+.1%}"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = make_parser("compare_plans", __doc__)
    parser.add_argument("--plans", type=Path, help="JSON file of rows as in PLANS")
    parser.add_argument("--only", action="append", help="name of a row to run; may be repeated")
    parser.add_argument("--preset", default="internlm2_tiny", help="of ilm_compile.models")
    parser.add_argument(
        "--override",
        action="append",
        metavar="FIELD=VALUE",
        help=f"config field of the preset; without any: {DEFAULT_OVERRIDES}",
    )
    parser.add_argument("--rows", type=int, default=16, help="sequences in the global batch")
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--rounds", type=int, default=1, help="of all plans, one after the other")
    parser.add_argument(
        "--hardware",
        metavar="FILE.toml",
        help="predict for this machine, which `ilm-compile calibrate` measures",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/compare_plans"))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    plans = json.loads(options.plans.read_text()) if options.plans else PLANS
    if options.only:
        plans = {name: plans[name] for name in options.only}
    given = (text.partition("=") for text in options.override or [])
    settings = Settings(
        preset=options.preset,
        overrides={field: json.loads(value) for field, _, value in given} or DEFAULT_OVERRIDES,
        rows=options.rows,
        seq_len=options.seq_len,
        steps=options.steps,
    )
    console = make_console()
    comparisons = compare_all(
        [Row(name, row) for name, row in plans.items()],
        settings,
        console,
        hardware=hardware_named(options.hardware) if options.hardware else None,
        rounds=options.rounds,
    )
    show(comparisons, settings, console)
    content: dict[str, Any] = {"settings": settings, "comparisons": comparisons}
    if options.hardware:
        content["predictions"] = {
            "hardware": Path(options.hardware).read_text().splitlines()
            if options.hardware.endswith(".toml")
            else options.hardware,
            "median_error": median_error(comparisons),
            "regret": regret(comparisons),
        }
    save_json(options.output / "comparison.json", content)
    plot_comparison(comparisons, options.output / "comparison.png")
    plot_timelines(comparisons, options.output / "timelines.png")
    console.print(f"written to {options.output}/: comparison.json, comparison.png, timelines.png")


if __name__ == "__main__":
    # What ranks are sent is pickled under the name of its module, which must not be "__main__".
    from benchmarks.compare_plans import main as run

    run()

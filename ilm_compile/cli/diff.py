"""Compare plans of one model side by side: what differs, what is predicted, what runs measured.

ilm-compile diff internlm2_7b a.json b.json --runs runs/a runs/b
Nothing is run: the model is traced once and compiled under each plan.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ilm_compile.cli.inputs import add_input_arguments, read_inputs
from ilm_compile.cli.job import read_model
from ilm_compile.cli.model import add_model_argument
from ilm_compile.errors import PlanError
from ilm_compile.partitioning import compile
from ilm_compile.planner.comparison import compare_programs, compare_runs
from ilm_compile.program.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_argument(parser)
    parser.add_argument("plans", type=Path, nargs="+", metavar="PLAN.json", help="two or more")
    add_input_arguments(parser)
    parser.add_argument(
        "--runs", type=Path, nargs="+", metavar="FOLDER", help="of a run of each, in this order"
    )


def run(options: argparse.Namespace) -> None:
    """Print the table."""
    if len(options.plans) < 2 or (options.runs and len(options.runs) != len(options.plans)):
        raise PlanError(
            f"diff: expected two plans or more and a run for each if any, got {len(options.plans)} "
            f"plans and {len(options.runs or [])} runs"
        )
    plans = [_read(path) for path in options.plans]
    measured = compare_runs(options.runs) if options.runs else []
    job = read_model(options.model)
    if job.config is None:
        job = replace(job, example_inputs=read_inputs(options))
    traced = job.trace()
    lines = [*compare_programs([compile(traced, plan) for plan in plans]), *measured]
    table = Table(box=SIMPLE_HEAD)
    for name in ("", *(path.name for path in options.plans)):
        table.add_column(name, justify="right" if name else "left")
    for line in lines:
        table.add_row(line.what, *line.values)
    Console(soft_wrap=True).print(table)


def _read(path: Path) -> Plan:
    try:
        return Plan.from_json(path)
    except json.JSONDecodeError as error:
        raise PlanError(f"diff: expected the JSON of a plan in {path}: {error}") from error

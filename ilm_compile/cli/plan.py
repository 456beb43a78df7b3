"""The options that make up a plan, and the plan they make."""

import argparse
import json
from dataclasses import fields
from pathlib import Path

from ilm_compile.errors import PlanError
from ilm_compile.partitioning import make_plan
from ilm_compile.program.plan import AUTO, SELECTIVE, Plan
from ilm_compile.schedule import known_schedules


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of `Plan` that changes the program."""
    plan = parser.add_argument_group("plan", "An option left out is as in --plan, or as in Plan.")
    plan.add_argument("--plan", type=Path, metavar="FILE", help="JSON to start from")
    for name in ("tp", "cp", "ep", "pp", "num-chunks", "num-microbatches"):
        plan.add_argument(f"--{name}", type=int, metavar="N")
    plan.add_argument("--schedule", help=", ".join(known_schedules()))
    plan.add_argument("--sequence-parallel", action=argparse.BooleanOptionalAction)
    plan.add_argument("--async-tensor-parallel", action=argparse.BooleanOptionalAction)
    plan.add_argument("--cp-attention", help="heads or queries: how cp divides attention")
    plan.add_argument("--embed-split-hidden", action=argparse.BooleanOptionalAction)
    plan.add_argument("--dispatch", action=argparse.BooleanOptionalAction)
    plan.add_argument(
        "--checkpoint",
        type=_fraction,
        metavar="FRACTION",
        help="of the blocks, or selective, or auto",
    )
    plan.add_argument("--memory", metavar="BYTES", help="that --checkpoint auto keeps to: 80GiB")
    plan.add_argument("--kernels", help="auto, triton or torch: fused ops, or none")
    plan.add_argument("--compile", action=argparse.BooleanOptionalAction)
    plan.add_argument("--dtype", help="of matmuls and attention: bfloat16, float16")


def _fraction(text: str) -> float | str:
    return text if text in (AUTO, SELECTIVE) else float(text)


def read_plan(options: argparse.Namespace, start: Plan | None = None) -> Plan:
    """The plan that the options describe, beginning from `start` where --plan is left out."""
    given = vars(options)
    try:
        return make_plan(options.plan or start, **{f.name: given.get(f.name) for f in fields(Plan)})
    except json.JSONDecodeError as error:
        raise PlanError(f"expected the JSON of a plan in {options.plan}: {error}") from error

"""Print what partitioning a model does and why, or the graph that comes out of it.

Runs in one process and computes nothing: ilm-compile explain internlm2_7b --tp 8 --pp 4
"""

import argparse

from torch import nn

from ilm_compile.cli.inputs import add_input_arguments, read_inputs
from ilm_compile.cli.model import add_model_argument, load_model
from ilm_compile.cli.plan import add_plan_arguments, read_plan
from ilm_compile.compile import partition
from ilm_compile.errors import IlmCompileError
from ilm_compile.passes import order_passes, run_passes, standard_passes
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import ExampleInputs, trace

TRACE = "trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_argument(parser)
    add_input_arguments(parser)
    parser.add_argument(
        "--after", metavar="PASS", help=f"stop after this pass; {TRACE}: before the first"
    )
    parser.add_argument("--dump", action="store_true", help="print the graph")
    add_plan_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Partition and print."""
    plan = read_plan(options)
    inputs = read_inputs(options)
    model = load_model(options.model)
    if options.after is None:
        program = partition(model, example_inputs=inputs, plan=plan)
    else:
        program = _partition_until(options.after, model, inputs, plan)
    print(program.dump() if options.dump else program.explain(), end="")


def _partition_until(
    last: str, model: nn.Module, inputs: ExampleInputs | None, plan: Plan
) -> Program:
    """Trace, then run the passes up to the one named `last`."""
    program = trace(model, example_inputs=inputs, plan=plan)
    passes = order_passes(standard_passes(plan), program.facts)
    names = [TRACE, *(step.name for step in passes)]
    if last not in names:
        raise IlmCompileError(
            f"explain: no pass {last!r} in this plan; expected one of {', '.join(names)}"
        )
    run_passes(program, passes[: names.index(last)])
    return program

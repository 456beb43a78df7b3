"""Print what partitioning a model does and why, or the graph that comes out of it.

Runs in one process and computes nothing: ilm-compile explain internlm2_7b --tp 8 --pp 4
"""

import argparse
from pathlib import Path

from ilm_compile.cli.job import Job, add_job_arguments, read_job
from ilm_compile.cost.hardware import hardware_named
from ilm_compile.errors import IlmCompileError
from ilm_compile.partitioning import partition
from ilm_compile.passes import order_passes, run_passes
from ilm_compile.passes.standard import plan_passes
from ilm_compile.planner import expect, simulate_step
from ilm_compile.program.program import Program

TRACE = "trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_job_arguments(parser)
    parser.add_argument(
        "--after", metavar="PASS", help=f"stop after this pass; {TRACE}: before the first"
    )
    parser.add_argument("--dump", action="store_true", help="print the graph")
    parser.add_argument(
        "--simulate", action="store_true", help="print when each pipeline rank computes in a step"
    )
    parser.add_argument(
        "--hardware", help="whose step is expected: a name, or a .toml file; else the plan's"
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="write that as a Chrome trace, with the memory"
    )


def run(options: argparse.Namespace) -> None:
    """Partition and print."""
    job = read_job(options)
    if options.after is not None:
        program = _partition_until(options.after, job)
    else:
        program = partition(
            job.model, example_inputs=job.example_inputs, loss_fn=job.loss_fn, plan=job.plan
        )
    hardware = hardware_named(options.hardware or program.plan.hardware)
    if options.simulate or options.trace:
        step = simulate_step(program, hardware)
        print(step.grid())
        if options.trace:
            step.to_chrome_trace(options.trace)
        return
    print(program.dump() if options.dump else program.explain(), end="")
    if not options.dump and options.after is None:
        print(f"\nexpected on {expect(program, hardware)}")


def _partition_until(last: str, job: Job) -> Program:
    """Trace, then run the passes up to the one named `last`."""
    program = job.trace()
    program.plan = job.plan
    passes = order_passes(plan_passes(program), program.facts)
    names = [TRACE, *(step.name for step in passes)]
    if last not in names:
        raise IlmCompileError(
            f"explain: no pass {last!r} in this plan; expected one of {', '.join(names)}"
        )
    run_passes(program, passes[: names.index(last)])
    return program

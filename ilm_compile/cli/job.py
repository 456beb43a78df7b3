"""What a command works on: a model, its plan and its inputs, from options or from a config file."""

import argparse
from dataclasses import dataclass

from torch import nn

from ilm_compile.cli.inputs import add_input_arguments, read_inputs
from ilm_compile.cli.model import add_model_argument, is_config, load_model
from ilm_compile.cli.plan import add_plan_arguments, read_plan
from ilm_compile.config import load_config
from ilm_compile.errors import IlmCompileError
from ilm_compile.program.plan import Plan
from ilm_compile.program.trace import ExampleInputs, LossFn
from ilm_compile.training.model import build_model, input_spec, loss_function


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """The arguments of `partition` and `verify`."""

    model: nn.Module
    plan: Plan
    example_inputs: ExampleInputs | None
    loss_fn: LossFn | None = None


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, the inputs and the plan."""
    add_model_argument(parser)
    add_input_arguments(parser)
    add_plan_arguments(parser)


def read_job(options: argparse.Namespace) -> Job:
    """The job that the options describe. Options of the plan go over that of a config."""
    if not is_config(options.model):
        return Job(
            plan=read_plan(options),
            example_inputs=read_inputs(options),
            model=load_model(options.model),
        )
    given = {"--plan": options.plan, "--seq-len": options.seq_len, "--rows": options.rows}
    if twice := [name for name, value in given.items() if value is not None]:
        raise IlmCompileError(f"{options.model} says it already: leave out {', '.join(twice)}")
    config = load_config(options.model)
    return Job(
        plan=read_plan(options, config.plan()),
        example_inputs=input_spec(config),
        model=build_model(config),
        loss_fn=loss_function(config),
    )

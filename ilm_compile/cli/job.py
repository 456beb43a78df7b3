"""What a command works on: a model, its plan and its inputs, from options or from a config file."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from torch import nn

from ilm_compile.cli.inputs import add_input_arguments, read_inputs, token_inputs
from ilm_compile.cli.model import add_model_argument, is_config, load_model
from ilm_compile.cli.plan import add_plan_arguments, read_plan
from ilm_compile.config import Config, load_config
from ilm_compile.errors import IlmCompileError
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import ExampleInputs, LossFn, trace
from ilm_compile.training.model import build_model, input_spec, loss_function


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What MODEL names: the model on the meta device and what is trained, a config if it is one.

    plan, example_inputs: as the options say, or the config; with it and loss_fn, the arguments of
    `partition` and `verify`.
    """

    model: nn.Module
    plan: Plan
    example_inputs: ExampleInputs | None
    loss_fn: LossFn | None = None
    config: Config | None = None

    def trace(self) -> Program:
        """Return the traced model."""
        return trace(self.model, example_inputs=self.example_inputs, loss_fn=self.loss_fn)

    def with_micro_batch(self, rows: int, tokens: int) -> Job:
        """Return the same with inputs of so many rows; of a config, its own rows of its tokens."""
        if self.config is None:
            return replace(self, example_inputs=token_inputs(rows, tokens))
        data = replace(self.config.data, micro_bsz=rows)
        return replace(self, example_inputs=input_spec(replace(self.config, data=data)))


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, the inputs and the plan."""
    add_model_argument(parser)
    add_input_arguments(parser)
    add_plan_arguments(parser)


def read_job(options: argparse.Namespace) -> Job:
    """The job that the options describe. Options of the plan go over that of a config."""
    job = read_model(options.model)
    if job.config is None:
        return replace(job, plan=read_plan(options), example_inputs=read_inputs(options))
    given = {"--plan": options.plan, "--seq-len": options.seq_len, "--rows": options.rows}
    if twice := [name for name, value in given.items() if value is not None]:
        raise IlmCompileError(f"{options.model} says it already: leave out {', '.join(twice)}")
    return replace(job, plan=read_plan(options, job.plan))


def read_model(name: str) -> Job:
    """The job of MODEL alone: a config's own, or the model with the inputs that it names."""
    if not is_config(name):
        return Job(model=load_model(name), plan=Plan(), example_inputs=None)
    config = load_config(name)
    return Job(
        config=config,
        model=build_model(config),
        plan=config.plan(),
        example_inputs=input_spec(config),
        loss_fn=loss_function(config),
    )

"""The small models of `ilm_compile.proof.zoo`, verified and compiled, for the tests of verify."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import ilm_compile
from ilm_compile.passes import run_passes, standard_passes
from ilm_compile.program.copy import copy_program
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.proof import zoo
from ilm_compile.proof.mutations import Trial
from ilm_compile.proof.promote import promoted_float32
from ilm_compile.proof.report import Report
from ilm_compile.schedule import schedule_of
from tests.support.batches import random_batch

ROWS = 2
INPUTS = {name: ((ROWS, zoo.SEQ), torch.int64) for name in ("input_ids", "labels")}


def make_model(name: str) -> nn.Module:
    return zoo.make_model(zoo.MODELS[name])


def verify(name: str, **keywords: Any) -> Report:
    return ilm_compile.verify(make_model(name), example_inputs=INPUTS, **keywords)


def compile_model(model: nn.Module, **plan: Any) -> Program:
    with promoted_float32():
        return ilm_compile.partition(model, example_inputs=INPUTS, **plan)


def make_batch(program: Program, dp: int = 1) -> dict[str, Tensor]:
    count = program.plan.num_microbatches * dp
    return random_batch(program.inputs, count, zoo.VOCAB)


def make_trial(name: str, **plan: Any) -> Trial:
    """A trial of mutants; with a dtype the program is compiled from the float32 model."""
    settled = Plan(num_microbatches=2).replace(**plan)
    model = make_model(name).float() if settled.dtype else make_model(name)
    traced = replace(trace(model, example_inputs=INPUTS), plan=settled)
    program = copy_program(traced)
    run_passes(program, standard_passes(settled))
    return Trial(traced, program, schedule_of(settled), model)

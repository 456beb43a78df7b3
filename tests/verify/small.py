"""The small models of `ilm_compile.verify.zoo`, verified and compiled, for the tests of verify."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import ilm_compile
from ilm_compile.compile import make_schedule
from ilm_compile.program.program import Program
from ilm_compile.verify import zoo
from ilm_compile.verify.mutations import Trial
from ilm_compile.verify.promote import promoted_float32
from ilm_compile.verify.reference import random_batch
from ilm_compile.verify.report import Report

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


def make_deep_trial(**plan: Any) -> Trial:
    """A trial of faults in the last two of four blocks, of which the first two take the step."""
    deep = zoo.make_model(lambda: zoo.internlm2_tiny(**{**zoo.SIZES, "num_layers": 4}))
    small = zoo.make_model(lambda: zoo.internlm2_tiny(**zoo.SIZES))
    program, stepped = (compile_model(model, **plan) for model in (deep, small))
    return Trial(program, make_schedule(program.plan), deep, make_batch(program), stepped)


def make_trial(name: str, **plan: Any) -> Trial:
    """A trial of mutants; with a dtype the program is compiled from the float32 model."""
    model = make_model(name)
    compiled = make_model(name).float() if plan.get("dtype") else model
    program = compile_model(compiled, **plan)
    return Trial(program, make_schedule(program.plan), model, make_batch(program))

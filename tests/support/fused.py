"""Programs with fused ops, for the tests of the passes that fuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import ilm_compile
from ilm_compile.models import internlm2_tiny, internlm_tiny
from ilm_compile.passes import FuseKernels, FuseResidual, run_passes
from ilm_compile.program.copy import copy_program
from ilm_compile.program.dump import target_name
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.proof import zoo as small
from ilm_compile.proof.promote import promoted_float32
from tests.support import zoo

INPUTS = {name: ((2, 16), torch.int64) for name in ("input_ids", "labels")}
OPS = NORM, ADD_NORM, LAYER_NORM, ADD_LAYER_NORM, ROTARY, QKV, GLU = tuple(
    f"ilm.{name}"
    for name in (
        *("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"),
        *("rotary", "qkv_rotary", "glu"),
    )
)
# The fused ops of the second of two blocks; each model has one add_rms_norm more, before its head.
OURS: dict[str, Callable[[], nn.Module]] = {
    "InternLM": lambda: internlm_tiny(**small.SIZES),
    "InternLM2": lambda: internlm2_tiny(**small.SIZES, num_kv_attention_heads=2),
    "InternLM2, sorted": lambda: internlm2_tiny(
        **small.SIZES, num_kv_attention_heads=2, adapt_hf=False
    ),
}


def make_model(name: str) -> nn.Module:
    return small.make_model(OURS[name]) if name in OURS else zoo.listed_model(name)


@cache
def traced_model(name: str) -> tuple[nn.Module, Program]:
    model = make_model(name)
    with promoted_float32():
        return model, trace(model, example_inputs=INPUTS)


@cache
def fused_model(name: str) -> Program:
    return fused(traced_model(name)[1])


def fused(program: Program) -> Program:
    result = copy_program(program)
    run_passes(result, [FuseKernels(), FuseResidual()])
    return result


def count(program: Program, region: str | None = None) -> dict[str, int]:
    """The fused ops of a program, or of one of its blocks."""
    names = Counter(
        target_name(node)
        for node in program.calls()
        if region is None or program.regions[node.meta["region"]].name == region
    )
    return {name: names[name] for name in OPS if names[name]}


class Body(nn.Module):
    """A function of a value (2, 4, 4, 6) that parameters reach, and its mean as the loss."""

    def __init__(self, function: Callable[..., Any], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, 6, dtype=dtype))
        self.weight = nn.Parameter(torch.linspace(1.0, 2.0, 6, dtype=dtype))
        self.trained = nn.Parameter(torch.linspace(0.0, 1.0, 3, dtype=dtype))
        self.register_buffer("angles", torch.rand(1, 4, 1, 3, dtype=dtype))
        self.function = function

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        values = self.function(self, x * self.scale)
        values = values if isinstance(values, tuple) else (values,)
        return {"loss": sum(value.sum() for value in values)}  # type: ignore[dict-item]


def traced(function: Callable[..., Any], dtype: torch.dtype = torch.float64) -> Program:
    return trace(Body(function, dtype), example_inputs={"x": ((2, 4, 4, 6), dtype)})


def partitioned(name: str = "InternLM2", **plan: Any) -> Program:
    model = traced_model(name)[0]
    with promoted_float32():
        return ilm_compile.partition(model, example_inputs=INPUTS, kernels="triton", **plan)

"""Further batch shapes of one model: what they are, and that their programs own the same."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ilm_compile.errors import PlanError
from ilm_compile.passes import Pass
from ilm_compile.passes.pipeline_split import PipelineSplit
from ilm_compile.program.calling import ExampleInputs
from ilm_compile.program.layout import WEIGHT_AXES
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Input, Program, Variable

Shapes = Sequence[Mapping[str, Any]]


def read_shapes(inputs: Mapping[str, Input], shapes: Shapes) -> list[dict[str, Input]]:
    """The inputs of a micro-batch of each further shape, by name.

    inputs: those of the first. shapes: for each input of the first a tensor, (shape, dtype) or the
    shape alone. Raises `PlanError` for other names, dtypes or numbers of dimensions, and for a
    shape that is given twice.
    """
    found = [{n: Input(i.shape, i.dtype) for n, i in inputs.items()}]
    for index, given in enumerate(shapes):
        where = f"shapes[{index}]"
        if not isinstance(given, Mapping) or set(given) != set(inputs):
            names = list(given) if isinstance(given, Mapping) else repr(given)
            raise PlanError(
                f"{where}: expected a shape for each input of the first, {list(inputs)}, got "
                f"{names}"
            )
        read = {name: _read(given[name], spec, f"{where}: {name}") for name, spec in inputs.items()}
        if read in found:
            raise PlanError(f"{where}: {shown(read)} is given twice; leave it out")
        found.append(read)
    return found[1:]


def _read(given: Any, first: Input, what: str) -> Input:
    dtype = first.dtype
    if isinstance(given, Tensor):
        given, dtype = given.shape, given.dtype
    elif len(given) == 2 and isinstance(given[1], torch.dtype):
        given, dtype = given
    shape = tuple(given)
    if (
        len(shape) != len(first.shape)
        or dtype != first.dtype
        or not all(type(size) is int and size > 0 for size in shape)
    ):
        raise PlanError(
            f"{what}: expected {len(first.shape)} sizes above 0 and {first.dtype}, as in "
            f"{first.shape}, got {shape} and {dtype}"
        )
    return Input(shape, dtype)


def example_of(inputs: Mapping[str, Input], first: Program) -> ExampleInputs:
    """The `example_inputs` of a shape, arguments that are no tensors as in the first program."""
    tensors = {name: (spec.shape, spec.dtype) for name, spec in inputs.items()}
    return {**tensors, **first.arguments}


def plan_like(first: Program, plan: Plan) -> Plan:
    """The plan under which another program places each parameter where `first` does."""
    placed = tuple(
        (glob.escape(n), str(v.layout.on(WEIGHT_AXES[0]))) for n, v in first.parameters().items()
    )
    return plan.replace(constraints=placed)


def passes_like(first: Program | None, passes: Sequence[Pass]) -> list[Pass]:
    """The passes that put each parameter into the stage where `first`, if any, has it."""
    if first is None:
        return list(passes)
    return [replace(p, like=first) if isinstance(p, PipelineSplit) else p for p in passes]


def check_alike(first: Program, other: Program) -> None:
    """Raise `PlanError` unless both programs hold the same parameters in the same way."""
    ours, theirs = first.parameters(), other.parameters()
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if _held(ours.get(name)) != _held(theirs.get(name)):
            raise PlanError(
                f"shapes: {name} is {_held(ours.get(name))} in the program of the first shape and "
                f"{_held(theirs.get(name))} in that of {shown(other.inputs)}; compile a program of "
                "its own for this shape"
            )
    counted = [_counts(first), _counts(other)]
    if counted[0] != counted[1]:
        raise PlanError(
            f"shapes: the loss of the first shape needs {counted[0]} counted in a batch, and that "
            f"of {shown(other.inputs)} {counted[1]}; compile a program of its own for this shape"
        )


def _counts(program: Program) -> dict[str, tuple[int, ...]]:
    """The shapes of what is counted in a batch, by name."""
    placeholders = program.graph.find_nodes(op="placeholder")
    shapes = {str(node.target): tuple(node.meta["val"].shape) for node in placeholders}
    return {name: shapes[name] for name in program.target_counts}


def _held(variable: Variable | None) -> tuple[Any, ...] | None:
    if variable is None:
        return None
    return (variable.shape, variable.padding, variable.dtype, str(variable.layout))


def shown(inputs: Mapping[str, Input]) -> str:
    """A shape for people: "input_ids (2, 16), labels (2, 16)"."""
    return ", ".join(f"{name} {spec.shape}" for name, spec in inputs.items())

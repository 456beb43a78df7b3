"""What a proof puts into a program's parameters and buffers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.program import Program, Variable
from ilm_compile.runtime.initial_values import InitialValues


def random_parameter(variable: Variable) -> Tensor:
    """Return a value that the parameter's name and shape determine, in its dtype.

    Matrices keep the scale of what they multiply, vectors lie about 1.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(variable.name.encode()))
    shape = variable.user_shape
    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    is_matrix = len(shape) > 1
    value = value / math.sqrt(shape[-1]) if is_matrix else 1 + 0.1 * value
    return value.to(variable.dtype)


def buffer_values(model: nn.Module | None, program: Program) -> dict[str, Tensor]:
    """Return the values of the model's buffers by name: its own, or those it would start from.

    Constants of the graph, which have values there, are left out. A buffer on the meta device that
    nothing computes gets ones, or random numbers if it is of floating point.
    """
    values = None if model is None else InitialValues(model, seed=program.plan.seed)
    found = {}
    for name, variable in program.variables.items():
        if variable.is_parameter or not _is_meta(program, name):
            continue
        try:
            if values is None:
                raise IlmCompileError("no model")
            found[name] = values.shard(variable).clone()
        except (IlmCompileError, AttributeError, KeyError):
            is_float = variable.dtype.is_floating_point
            shape, dtype = variable.shape, variable.dtype
            found[name] = random_parameter(variable) if is_float else torch.ones(shape, dtype=dtype)
    return found


def tensors_for(
    program: Program, buffers: dict[str, Tensor], names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Return values for variables of `program`, all unless named, in its dtypes and sizes."""
    found = {}
    for name in program.variables if names is None else names:
        variable = program.variables[name]
        if variable.is_parameter:
            found[name] = random_parameter(variable)
        elif name in buffers:
            value = buffers[name][tuple(map(slice, variable.user_shape))]
            found[name] = value.to(variable.dtype)
    return found


def _is_meta(program: Program, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    try:
        value: Tensor = getattr(program.graph_module.get_submodule(owner), leaf)
    except AttributeError:  # nothing uses it
        return True
    return value.is_meta

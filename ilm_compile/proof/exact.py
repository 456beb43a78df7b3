"""A mixed-precision program in float64: the same nodes, with casts that round nothing.

Whether a bf16 program trains the same model cannot be told from its numbers, which are rounded.
With every float type in it set to float64 it must be equal to 1e-10 like any other program; that
each op is given and gives the types it should is the value check's business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.copy import copy_program
from ilm_compile.program.expert_rows import grouped_product
from ilm_compile.program.program import Program
from ilm_compile.program.values import map_tensors

ROUNDED = {torch.float32, torch.bfloat16, torch.float16}


def exact(program: Program) -> Program:
    """Return a copy of `program` in which every floating-point value is float64."""
    result = copy_program(program)
    for node in result.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, _widened)
        node.kwargs = fx.node.map_aggregate(node.kwargs, _widened)
        if node.target is torch.ops.aten._grouped_mm.default:
            node.target = grouped_product
        if "val" in node.meta:
            node.meta["val"] = map_tensors(_exact, node.meta["val"])
    for variable in result.variables.values():
        variable.dtype = _widened(variable.dtype)
    for module in result.graph_module.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point() and not buffer.is_meta:
                module._buffers[name] = buffer.double()
    result.finish()
    return result


def _exact(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return value.new_empty_strided(value.shape, value.stride(), dtype=torch.float64)


def _widened(argument: Any) -> Any:
    is_rounded = isinstance(argument, torch.dtype) and argument in ROUNDED
    return torch.float64 if is_rounded else argument

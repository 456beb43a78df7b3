"""The value check: what a program says of each value is what the op makes of its inputs.

Passes write shapes and dtypes into ``node.meta["val"]``, and later passes, the stage boundaries and
the cost model believe them. Here every call is run again without data. A cast that was left out, a
size that is still the global one, a message buffer of the wrong dtype: each shows as a difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.errors import ProgramError
from ilm_compile.ops.precision import PRODUCT
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.communicator import shape_communicators
from ilm_compile.program.program import Program
from ilm_compile.program.values import run_without_data, tensors_of


def check_values(program: Program) -> None:
    """Raise `ProgramError` naming the node whose op does not give the shape and dtype recorded."""
    with shape_communicators(program.plan.axes), torch.no_grad():
        for node in program.calls():
            _check(program, node)


def _check(program: Program, node: fx.Node) -> None:
    try:
        value = run_without_data(node)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise ProgramError(
            f"value check: {_name(node)} cannot run on ({_inputs(node)}) at {program.where(node)}: "
            f"{reason}"
        ) from None
    if spec_of(node.target).precision is PRODUCT and len(dtypes := _float_dtypes(node)) > 1:
        raise ProgramError(  # without data the op does not ask for it, with data it does
            f"value check: {_name(node)} takes one dtype, got {' and '.join(sorted(dtypes))} "
            f"({_inputs(node)}) at {program.where(node)}. Is a cast missing?"
        )
    expected, found = _types(node.meta["val"]), _types(value)
    if expected != found:
        raise ProgramError(
            f"value check: {_name(node)} of ({_inputs(node)}) gives {found}, but the program says "
            f"{expected} at {program.where(node)}. Is a cast missing, or a size still global?"
        )


def _inputs(node: fx.Node) -> str:
    return ", ".join(_types(source.meta["val"]) for source in node.all_input_nodes)


def _float_dtypes(node: fx.Node) -> set[str]:
    tensors = [t for source in node.all_input_nodes for t in tensors_of(source.meta["val"])]
    return {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}


def _name(node: fx.Node) -> str:
    is_op = isinstance(node.target, torch._ops.OpOverload)
    return str(node.target) if is_op else str(getattr(node.target, "__name__", node.target))


def _types(value: Any) -> str:
    return ", ".join(map(_type, tensors_of(value)))


def _type(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"

"""Where a program that is to compute in the model's own dtypes rounds: nowhere but the model does.

The proof runs in float64, where a cast rounds nothing. Under a compute dtype the casts have an
error budget (`ilm_compile.verify.precision`); without one there must be none that the model lacks.
"""

from __future__ import annotations

import torch
from torch import fx

from ilm_compile.errors import ProgramError
from ilm_compile.program.program import Program
from ilm_compile.program.values import tensors_of


def check_dtypes(traced: Program, program: Program) -> None:
    """Raise `ProgramError` if `program`, of no compute dtype, rounds where `traced` does not.

    Values of both graphs, by name, must have one dtype; other calls must give no fewer digits than
    they are given.
    """
    if program.plan.dtype is not None or "cast" in program.facts:
        return
    known = {node.name: _dtypes(node) for node in traced.calls()}
    for node in program.calls():
        ours = _dtypes(node)
        if node.name in known:
            if ours != known[node.name]:
                _fail(program, node, f"{ours}", f"{known[node.name]}, as in the model")
            continue
        given = [d for source in node.all_input_nodes for d in _dtypes(source)]
        if given and ours and _digits(ours) < _digits(given):
            _fail(program, node, f"{ours}", f"no fewer digits than its inputs have, {given}")


def _dtypes(node: fx.Node) -> list[torch.dtype]:
    values = tensors_of(node.meta.get("val"))
    return [value.dtype for value in values if value.is_floating_point()]


def _digits(dtypes: list[torch.dtype]) -> float:
    return max(-torch.finfo(dtype).eps for dtype in dtypes)


def _fail(program: Program, node: fx.Node, found: str, expected: str) -> None:
    raise ProgramError(
        f"{program.where(node)} gives {found}; expected {expected}: the plan has no compute dtype, "
        "so that nothing may be rounded that the model does not round"
    )

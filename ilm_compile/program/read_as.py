"""Which parameters a stage casts wherever it uses them: it may be given them cast.

A fused head casts its weight itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ilm_compile.program.boundaries import stage_of
from ilm_compile.program.linear_loss import linear_cross_entropy, output_logits
from ilm_compile.program.program import Program

aten = torch.ops.aten
HEADS = (linear_cross_entropy, output_logits)  # of x and a weight, which they read in x's dtype


def read_as(program: Program) -> list[dict[str, torch.dtype]]:
    """Return, for each stage, its parameters that every use casts to one smaller dtype, and that.

    A parameter that is also used as it is, on the same stage, is not among them.
    """
    placed = stage_of(program)
    uses: list[dict[str, set[Any]]] = [{} for _ in range(max(placed.values(), default=0) + 1)]
    for node, stage in placed.items():
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                uses[stage].setdefault(str(source.target), set()).add(_read_in(node))
    for node in program.outputs:
        uses[-1].pop(str(node.target), None)
    return [
        {n: next(iter(dtypes)) for n, dtypes in stage.items() if _is_smaller(program, n, dtypes)}
        for stage in uses
    ]


def cast_weights(program: Program) -> set[fx.Node]:
    """Return the casts that do nothing, since their stage is given the parameter cast."""
    dtypes = read_as(program)
    return {
        node
        for node, stage in stage_of(program).items()
        if _cast_to(node) is not None
        and (source := node.all_input_nodes[0]).op == "get_attr"
        and source.target in dtypes[stage]
    }


def _read_in(node: fx.Node) -> Any:
    """Return the dtype in which a call reads a parameter that it is given; None for as it is."""
    return node.args[0].meta["val"].dtype if node.target in HEADS else _cast_to(node)  # type: ignore[union-attr]


def _cast_to(node: fx.Node) -> Any:
    """Return the dtype that a call casts to and does nothing else; None for other calls."""
    is_cast = node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs
    return node.args[1] if is_cast else None


def _is_smaller(program: Program, name: str, dtypes: set[Any]) -> bool:
    variable = program.variables[name]
    return (
        variable.is_parameter
        and len(dtypes) == 1
        and None not in dtypes
        and all(dtype.itemsize < variable.dtype.itemsize for dtype in dtypes)
    )

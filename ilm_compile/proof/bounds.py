"""Bounds that numbers may not reach: a proof on random values says nothing of where a clamp is, and
one of fewer tokens nothing of a window that is longer."""

from __future__ import annotations

from torch import fx

from ilm_compile.errors import ProgramError
from ilm_compile.ops.nodes import called_name
from ilm_compile.program.program import Program

BOUNDED = {
    *("aten::clamp", "aten::clamp_", "aten::clamp_min", "aten::clamp_max", "aten::hardtanh"),
    *("aten::threshold", "aten::nan_to_num", "aten::relu6", "aten::hardshrink", "aten::softshrink"),
    *("aten::gt", "aten::ge", "aten::lt", "aten::le", "aten::eq", "aten::ne"),
    *("aten::tril", "aten::triu"),
}
ARITHMETIC = {"aten::add", "aten::sub", "aten::rsub", "aten::floor_divide", "aten::remainder"}


def check_bounds(traced: Program, program: Program) -> None:
    """Raise `ProgramError` if a call that both graphs have, by name, has other bounds."""
    known = {node.name: node for node in traced.calls()}
    for node in program.calls():
        origin = known.get(node.name)
        if origin is None or node.target is not origin.target or not _has_bounds(node):
            continue
        ours, theirs = _numbers(node), _numbers(origin)
        if ours != theirs:
            raise ProgramError(
                f"{program.where(node)} has bounds {ours}; expected {theirs}, as in the model: "
                "whether a value reaches them depends on the weights and on the length of a batch"
            )


def _has_bounds(node: fx.Node) -> bool:
    """Whether `node` bounds values, or reckons with the positions that a mask bounds."""
    name = called_name(node)
    is_position = name in ARITHMETIC and not node.meta["val"].is_floating_point()
    return name in BOUNDED or is_position


def _numbers(node: fx.Node) -> list[float]:
    given = (*node.args, *node.kwargs.values())
    return [v for v in given if isinstance(v, int | float) and not isinstance(v, bool)]

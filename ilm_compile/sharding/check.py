"""The typed check: every placement in a program follows from its inputs by the rules.

It trusts nothing but the rule table: not the search, not the passes that ran since. A collective
that was dropped, doubled or retyped, a wrong shard dimension, a norm weight whose gradient would
not be reduced under sequence parallelism: each leaves some node whose placements no rule allows.
"""

from __future__ import annotations

from torch import fx

from ilm_compile.errors import PlacementError
from ilm_compile.program.collectives import TRANSITIONS, redistribute
from ilm_compile.program.dump import target_name
from ilm_compile.program.placement import I, Placement
from ilm_compile.program.program import Program
from ilm_compile.sharding.strategy import (
    Strategy,
    global_call,
    global_shape,
    placement_of,
    strategies,
    tensor_inputs,
)


def check_placements(program: Program) -> None:
    """Raise `PlacementError` naming the node unless every placement follows by the rules."""
    size = program.plan.tp
    for node in program.graph.nodes:
        problem = _PROBLEMS[node.op](program, node, size)
        if problem:
            raise PlacementError(f"placement check: {problem} at {program.where(node)}")


def _placeholder(program: Program, node: fx.Node, size: int) -> str | None:
    placement = placement_of(node)
    return None if placement == I else f"expected an input to be I, got {placement}"


def _attribute(program: Program, node: fx.Node, size: int) -> str | None:
    variable = program.variables[str(node.target)]
    placement = placement_of(node)
    if placement != variable.placement or placement.kind not in "IS":
        expected = f"I or {variable.placement}"
        return f"expected {variable.name} to be {expected}, got {placement}"
    if global_shape(node, size) != variable.shape:
        return f"{variable.name} has global shape {global_shape(node, size)}, not {variable.shape}"
    return None


def _call(program: Program, node: fx.Node, size: int) -> str | None:
    if node.target is redistribute:
        return _redistribute(node, size)
    found = Strategy(tuple(map(placement_of, tensor_inputs(node))), placement_of(node))
    legal = strategies(global_call(node, size), {found.output})
    if found in legal:
        return None
    given = ", ".join(map(str, found.inputs))
    same_output = [s for s in legal if s.output == found.output]
    expected = "; ".join(f"({', '.join(map(str, s.inputs))})" for s in same_output) or "no inputs"
    return (
        f"{target_name(node)} of ({given}) does not give {found.output}; that needs {expected}. "
        "Is a collective missing?"
    )


def _redistribute(node: fx.Node, size: int) -> str | None:
    (source,) = tensor_inputs(node)
    src, dst = (Placement.parse(str(node.kwargs[key])) for key in ("src", "dst"))
    if src != placement_of(source) or dst != placement_of(node):
        given = f"{placement_of(source)} -> {placement_of(node)}"
        return f"the collective is typed {src} -> {dst}, but the graph says {given}"
    if (src.kind, dst.kind) not in TRANSITIONS:
        return f"there is no transition {src} -> {dst}"
    shape = global_shape(source, size)
    if not dst.divides(shape, size) or global_shape(node, size) != shape:
        return f"{src} -> {dst} of a value of shape {shape} cannot give {global_shape(node, size)}"
    return None


def _output(program: Program, node: fx.Node, size: int) -> str | None:
    placement = placement_of(program.outputs[0])
    if placement == I:
        return None
    return f"expected the loss to be I, got {placement}; it is not fully reduced"


_PROBLEMS = {
    "placeholder": _placeholder,
    "get_attr": _attribute,
    "call_function": _call,
    "output": _output,
}

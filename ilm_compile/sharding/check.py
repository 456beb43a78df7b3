"""The typed check: every placement in a program follows from its inputs by the rules.

It trusts nothing but the rule table: not the search, not the passes that ran since. A collective
that was dropped, doubled or retyped, a wrong shard dimension, a norm weight whose gradient would
not be reduced under sequence parallelism: each leaves some node whose placements no rule allows.
"""

from __future__ import annotations

from torch import fx

from ilm_compile.errors import PlacementError
from ilm_compile.ops.call import Strategy, axis_of, tensor_inputs
from ilm_compile.ops.strategy import global_call, strategies
from ilm_compile.program.collectives import TRANSITIONS, redistribute
from ilm_compile.program.dump import target_name
from ilm_compile.program.expert_rows import OPERAND, ROUTES, route
from ilm_compile.program.layout import (
    AXES,
    EXPERT_AXIS,
    TOKEN_AXES,
    WEIGHT_AXES,
    MeshAxis,
    layout_of,
    sharded_over,
)
from ilm_compile.program.placement import I, Placement
from ilm_compile.program.program import Program

# What a parameter can be at rest.
AT_REST = {**dict.fromkeys(WEIGHT_AXES, "IS"), **dict.fromkeys(TOKEN_AXES, "R"), EXPERT_AXIS: "RS"}


def check_placements(program: Program) -> None:
    """Raise `PlacementError` naming the node unless every placement follows by the rules."""
    for axis in solved_axes(program):
        for node in program.graph.nodes:
            if problem := _PROBLEMS[node.op](program, node, axis):
                if axis.name not in WEIGHT_AXES:
                    problem = f"on axis {axis.name}, {problem}"
                raise PlacementError(f"placement check: {problem} at {program.where(node)}")


def solved_axes(program: Program) -> list[MeshAxis]:
    """Return the axes over which `program` was sharded; the first if there is one rank."""
    axes = program.plan.mesh_axes or [program.plan.axis(AXES[0])]
    return [a for a in axes if a.name not in TOKEN_AXES or sharded_over(a.name) in program.facts]


def _placeholder(program: Program, node: fx.Node, axis: MeshAxis) -> str | None:
    placement = axis.placement(node)
    return None if placement == I else f"expected an input to be I, got {placement}"


def _attribute(program: Program, node: fx.Node, axis: MeshAxis) -> str | None:
    variable = program.variables[str(node.target)]
    placement, held = axis.placement(node), variable.layout.on(axis.name)
    kinds = AT_REST[axis.name] if variable.is_parameter else "I"
    if placement != held or placement.kind not in kinds:
        return f"expected {variable.name} to be {' or '.join(kinds)} and {held}, got {placement}"
    sizes = program.plan.axes
    shape = layout_of(node).global_shape(tuple(node.meta["val"].shape), sizes)
    if shape != variable.shape:
        return f"{variable.name} has global shape {shape}, not {variable.shape}"
    return None


def _call(program: Program, node: fx.Node, axis: MeshAxis) -> str | None:
    if node.target in (redistribute, route) and axis_of(node) == axis.name:
        return _move(node, axis)
    placements = tuple(map(axis.placement, tensor_inputs(node)))
    found = Strategy(placements, axis.placement(node))
    legal = strategies(global_call(node, axis), {found.output})
    if found in legal:
        return None
    given = ", ".join(map(str, found.inputs))
    same_output = [s for s in legal if s.output == found.output]
    expected = "; ".join(f"({', '.join(map(str, s.inputs))})" for s in same_output) or "no inputs"
    return (
        f"{target_name(node)} of ({given}) does not give {found.output}; that needs {expected}. "
        "Is a collective missing?"
    )


def _move(node: fx.Node, axis: MeshAxis) -> str | None:
    source, *operands = tensor_inputs(node)
    src, dst = (Placement.parse(str(node.kwargs[key])) for key in ("src", "dst"))
    if src != axis.placement(source) or dst != axis.placement(node):
        given = f"{axis.placement(source)} -> {axis.placement(node)}"
        return f"the collective is typed {src} -> {dst}, but the graph says {given}"
    pair = src.kind, dst.kind
    if pair not in (ROUTES if node.target is route else TRANSITIONS):
        return f"there is no transition {src} -> {dst}"
    for operand in operands:
        if axis.placement(operand).kind != OPERAND[pair]:
            needed = f"{src} -> {dst} needs offsets that are {OPERAND[pair]}"
            return f"{needed}, {operand.name} is {axis.placement(operand)}"
    shape = axis.shape(source)
    if not dst.divides(shape, axis.size) or axis.shape(node) != shape:
        return f"{src} -> {dst} of a value of shape {shape} cannot give {axis.shape(node)}"
    return None


def _output(program: Program, node: fx.Node, axis: MeshAxis) -> str | None:
    placement = axis.placement(program.outputs[0])
    if placement == I:
        return None
    return f"expected the loss to be I, got {placement}; it is not fully reduced"


_PROBLEMS = {
    "placeholder": _placeholder,
    "get_attr": _attribute,
    "call_function": _call,
    "output": _output,
}

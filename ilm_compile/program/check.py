"""The structural check: what every program must satisfy, whatever the passes did to it."""

from __future__ import annotations

import operator

import torch
from torch import fx

from ilm_compile.errors import ProgramError
from ilm_compile.program.functions import FUNCTIONS
from ilm_compile.program.program import Program
from ilm_compile.program.values import is_tuple, tensors_of


def check_structure(program: Program) -> None:
    """Raise `ProgramError` naming the node unless `program` is in the project's dialect."""
    program.graph.lint()
    for node in program.graph.nodes:
        for problem in _problems(program, node):
            raise ProgramError(f"check: {problem} at {program.where(node)}")
    if len(program.outputs) != len(program.output_names):
        got = [node.name for node in program.outputs]
        raise ProgramError(f"check: expected the outputs {program.output_names}, got {got}")


def _problems(program: Program, node: fx.Node) -> list[str]:
    found = []
    if node.op in ("call_module", "call_method"):
        found.append(f"{node.op} is not allowed, only call_function; inline the call")
    if node.op == "call_function":
        if not isinstance(node.target, torch._ops.OpOverload) and node.target not in FUNCTIONS:
            found.append(f"{node.target} is no op and no typed collective; register it as an op")
        if not 0 <= node.meta.get("region", -1) < len(program.regions):
            found.append("no region; copy the meta of a neighbour")
    if node.op == "get_attr" and node.target not in program.variables:
        found.append(f"{node.target} is not among program.variables")
    if node.op != "output" and not tensors_of(node.meta.get("val")):
        found.append("no FakeTensor in node.meta['val']")
    if is_tuple(node) and any(user.target is not operator.getitem for user in node.users):
        found.append("a value of several tensors is used whole; use its items, by operator.getitem")
    if node.target is operator.getitem:
        found += _item_problems(node)
    return found


def _item_problems(node: fx.Node) -> list[str]:
    """What is wrong with a node that takes one result of a call with several."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    if source is None or not is_tuple(source):
        return ["getitem of what is no value of several tensors; index tensors with aten ops"]
    apart = [key for key in ("region", "stage") if node.meta.get(key) != source.meta.get(key)]
    return [f"in another {key} than {source.name}, whose result it is" for key in apart]

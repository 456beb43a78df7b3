"""The program as text: Python with shapes, placements and module paths in comments."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ilm_compile.program.program import Program
from ilm_compile.program.values import tensors_of


def dump(program: Program) -> str:
    """Return the graph as Python text, one line a node, grouped by stage, region and module."""
    names = {n: f"self.{n.target}" if n.op == "get_attr" else n.name for n in program.graph.nodes}
    placeholders = program.graph.find_nodes(op="placeholder")
    inputs = ", ".join(f"{node.target}: {_type(program, node)}" for node in placeholders)
    lines = [f"def forward(self, {inputs}):"]
    heading = None
    for node in program.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            lines.append(f"    return {_text(node.args[0], names)}")
            continue
        if node.op == "call_function" and (here := _heading(program, node)) != heading:
            lines.append(f"\n    # {here}")
            heading = here
        value = f" = {_call(node, names)}" if node.op == "call_function" else ""
        lines.append(f"    {names[node]}: {_type(program, node)}{value}")
    return "\n".join(lines) + "\n"


def _heading(program: Program, node: fx.Node) -> str:
    region = program.regions[node.meta["region"]]
    stage = f"stage {node.meta['stage']}, " if "stage" in node.meta else ""
    path = program.source(node).module_path
    recompute = ", recomputed" if region.recompute else ""
    recompute += ", recomputed in part" if region.selective else ""
    return f"{stage}{region.name}{recompute}: {path or 'top level'}"


def _type(program: Program, node: fx.Node) -> str:
    values = tensors_of(node.meta.get("val"))
    if not values:
        return type(node.meta.get("val")).__name__
    types = (f"{str(val.dtype).removeprefix('torch.')}{list(val.shape)}" for val in values)
    names = program.axis_names()
    placement = f" {node.meta['layout'].text(names)}" if "layout" in node.meta else ""
    return f'"{", ".join(types)}{placement}"'


def target_name(node: fx.Node) -> str:
    """Return a call's target as it is written in a dump, for example ``aten.linear``."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return str(getattr(target, "__name__", target))


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    args = [_text(arg, names) for arg in node.args]
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    args += [f"{key}={_text(value, names)}" for key, value in node.kwargs.items()]
    return f"{target_name(node)}({', '.join(args)})"


def _text(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        inner = ", ".join(_text(item, names) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    return repr(value)

"""Which pieces of a program are the same piece on other weights: one proof serves them all.

Alike are pieces whose traced and compiled calls have the same targets, wiring, shapes, placements
and constants, floats included, take the same buffers by value, share what they share, and train the
same weights. Only names may differ, and the salts of dropouts, as long as both graphs use them in
the same pattern.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.dropout import SALT, seeded_dropout
from ilm_compile.program.program import Program
from ilm_compile.program.values import tensors_of
from ilm_compile.proof.pieces import Piece, Slice


def signature(
    traced: Program, program: Program, piece: Piece, buffers: Mapping[str, Tensor]
) -> str:
    """Return a text that is the same for pieces that are alike."""
    names = _Names(buffers)
    parts = [
        names.text(traced, piece.traced, {}),
        names.text(program, piece.compiled, {a.node: a.origin for a in piece.inputs}),
        f"{[a.trained for a in (*piece.inputs, *piece.outputs)]} {piece.names}",
        *_maps(program, piece),
    ]
    return hashlib.sha256("\n\n".join(parts).encode()).hexdigest()


def _maps(program: Program, piece: Piece) -> list[str]:
    """A map between parameters is code: pieces that need one are like no other."""
    used = {str(node.target) for node in piece.compiled.calls if node.op == "get_attr"}
    return [each.targets[0] for each in program.parameter_maps if used & set(each.targets)]


class _Names:
    """Numbers for names, in the order in which they come up in both graphs."""

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self.buffers = buffers
        self.numbers: dict[Any, int] = {}

    def of(self, name: Any) -> int:
        return self.numbers.setdefault(name, len(self.numbers))

    def text(self, program: Program, part: Slice, origins: Mapping[fx.Node, fx.Node]) -> str:
        local: dict[fx.Node, str] = {}
        lines = []
        for node in part.inputs:
            local[node] = f"anchor{self.of(('anchor', origins.get(node, node).name))}"
            lines.append(f"{local[node]} {_type(node)}")
        for node in part.calls:
            if node.op == "placeholder":
                local[node] = f"input {node.target}"
            elif node.op == "get_attr":
                local[node] = self.variable(program, str(node.target))
            else:
                local[node] = f"%{len(local)}"
            lines.append(f"{local[node]} = {self.call(node, local)} {_type(node)}")
        lines += [f"return {local[node]}" for node in part.outputs]
        return "\n".join(lines)

    def variable(self, program: Program, name: str) -> str:
        variable = program.variables[name]
        kind = "parameter" if variable.is_parameter else "buffer"
        value = self.buffers.get(name)
        content = "" if value is None else _digest(value)
        words = (kind, self.of(("variable", name)), variable.shape, variable.dtype, content)
        return f"{words} {variable.requires_grad} {variable.layout} {variable.padding}"

    def call(self, node: fx.Node, local: Mapping[fx.Node, str]) -> str:
        if node.op != "call_function":
            return node.op
        args = list(node.args)
        if node.target is seeded_dropout:
            args[SALT] = f"salt{self.of(('salt', args[SALT]))}"
        given = fx.node.map_arg((tuple(args), dict(node.kwargs)), local.__getitem__)
        return f"{node.target}{given}"


def _type(node: fx.Node) -> str:
    values = [f"{value.dtype}{list(value.shape)}" for value in tensors_of(node.meta.get("val"))]
    return f"{values} {node.meta.get('layout')}"


def _digest(value: Tensor) -> str:
    wide = torch.float64 if value.is_floating_point() else torch.int64
    return hashlib.sha256(value.detach().cpu().to(wide).numpy().tobytes()).hexdigest()[:16]

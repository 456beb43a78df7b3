"""What a sharding rule is: from one call to the ways its inputs and output may be placed.

A rule is a function ``rule(call, wanted) -> Iterator[Strategy]``. It yields only placements under
which running the *same* op on rank-local values is right, forward and backward; all collectives
stand outside, between producer and consumer. `wanted` are the output placements somebody downstream
could use: a rule passes them through and need not invent them.

Two strategies need no rule and hold for every deterministic op: all inputs I give I, all inputs R
give R (each rank repeats the computation; gradients stay whole, or stay partial).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from ilm_compile.ops.batch_constants import Values
from ilm_compile.program.arguments import named
from ilm_compile.program.layout import MeshAxis
from ilm_compile.program.placement import Placement

aten = torch.ops.aten


class Strategy(NamedTuple):
    """One legal way to place a call: a placement per tensor input, in order, and the output's.

    Of an op with several results the output's placement is that of each.
    """

    inputs: tuple[Placement, ...]
    output: Placement


@dataclass(frozen=True)
class Call:
    """A call node as the rules see it on one axis; shapes are the global ones (`MeshAxis`)."""

    node: fx.Node
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]  # of the tensor inputs, in the order of `tensor_inputs`
    shape: tuple[int, ...]  # of the output
    axis: MeshAxis
    further: tuple[tuple[int, ...], ...] = ()  # of an op's results after the first

    @property
    def size(self) -> int:
        """The number of ranks on the axis."""
        return self.axis.size

    def argument(self, index: int, name: str, default: Any = None) -> Any:
        """Return the argument given by position or by name."""
        if len(self.args) > index:
            return self.args[index]
        return self.kwargs.get(name, default)

    def named(self, name: str) -> Any:
        """Return the argument that an op's schema calls `name`, or its default; None if none is."""
        return named(self.target, self.args, self.kwargs, name)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
LocalCall = tuple[Any, tuple[Any, ...], dict[str, Any]]
Rule = Callable[[Call, frozenset[Placement]], Iterator[Strategy]]
# Of the batch axis alone: (placements of the inputs, placement of the result, weight), the weight
# being the power of the number of slices by which the whole batch's value is multiplied.
Found = Iterator[tuple[tuple[Placement, ...], Placement, int]]
Spelling = Callable[[tuple[Any, ...]], tuple[Any, tuple[Any, ...]]]
BatchRule = Callable[[Call, frozenset[Placement], Values], Found]


def tensor_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the tensor arguments of `node` in order, one entry per use."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return tuple(found)


def axis_of(call: Call | fx.Node) -> str:
    """Return the axis over which a function of the graph talks: its last argument."""
    return str(call.kwargs.get("axis") or call.args[-1])


def unchanged(call: Call) -> LocalCall:
    """Return a call as it is: what most are on the values of one rank."""
    return call.target, call.args, call.kwargs

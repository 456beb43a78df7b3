"""Communicators that a graph is bound to: each has a name that no other communicator ever had.

While a program is compiled, its calls name a mesh axis ("tp"). When a stage is materialised they
get the name of this rank's communicator instead, "tp[1/4].7": rank 1 of 4. Whatever thread runs the
graph then reaches the same ranks. What is sent goes through an op, into which neither torch.compile
nor autograd looks: how the message travels, is timed and counted is not part of the graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.communicator import Communicator, communicator, named

_numbers = count()
_AXIS = "axis"  # in node.meta: the axis of a call that was bound

torch.library.define("ilm::all_reduce", "(Tensor x, str op, str axis) -> Tensor")


class BoundCommunicator:
    """A `Communicator` with a name, known by it for as long as this object lives."""

    def __init__(self, axis: str, real: Communicator) -> None:
        self.real = real
        self.rank, self.size = real.rank, real.size
        self.name = f"{axis}[{self.rank}/{self.size}].{next(_numbers)}"
        self.all_gather, self.reduce_scatter = real.all_gather, real.reduce_scatter
        self.all_to_all, self.exchange, self.shift = real.all_to_all, real.exchange, real.shift
        self.start = real.start
        named[self.name] = self

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Return the sum or maximum of every rank's `x`; traced as one op."""
        result: Tensor = torch.ops.ilm.all_reduce(x, op, self.name)
        return result


def bind(axes: Mapping[str, Communicator]) -> dict[str, BoundCommunicator]:
    """Return the communicators of `axes` with names; whoever runs the graphs keeps them."""
    return {axis: BoundCommunicator(axis, real) for axis, real in axes.items()}


def bind_axes(graph_module: fx.GraphModule, bound: Mapping[str, BoundCommunicator]) -> None:
    """Name `bound` in every call that names an axis, in a graph that is bound already anew.

    The caller recompiles.
    """
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        names = _parameters(node.target)
        if "axes" in names:  # it may need several
            node.update_kwarg("axes", {axis: each.name for axis, each in bound.items()})
        if "axis" not in names:
            continue
        position = names.index("axis")
        given = node.args[position] if position < len(node.args) else node.kwargs.get("axis")
        axis = node.meta.setdefault(_AXIS, given)
        if axis in bound:
            if position < len(node.args):
                node.update_arg(position, bound[axis].name)
            else:
                node.update_kwarg("axis", bound[axis].name)


@cache
def _parameters(target: Any) -> tuple[str, ...]:
    """The names of the parameters of what a graph calls, those of torch's own ops left out."""
    if isinstance(target, torch._ops.OpOverload):
        arguments = target._schema.arguments if target.namespace == "ilm" else ()
        return tuple(argument.name for argument in arguments)
    return tuple(inspect.signature(target).parameters) if inspect.isfunction(target) else ()


def real(axis: str) -> Communicator:
    """Return what moves the messages of the communicator of this name: for use inside an op."""
    found = communicator(axis)
    return found.real if isinstance(found, BoundCommunicator) else found


def fresh(result: Tensor, x: Tensor) -> Tensor:
    """Return `result` as an op must: contiguous, in memory that it does not share with `x`."""
    if result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        return result.clone(memory_format=torch.contiguous_format)
    return result.contiguous()


def _all_reduce(x: Tensor, op: str, axis: str) -> Tensor:
    return fresh(real(axis).all_reduce(x, op), x)


def _all_reduce_fake(x: Tensor, op: str, axis: str) -> Tensor:
    return x.new_empty(x.shape)


torch.library.impl("ilm::all_reduce", ("cpu", "cuda"), _all_reduce)
torch.library.register_fake("ilm::all_reduce", _all_reduce_fake)

"""What a sharding rule is: from one call to the ways its inputs and output may be placed.

A rule is a function ``rule(call, wanted) -> Iterator[Strategy]`` in the table `RULES`, keyed by op.
It yields only placements under which running the *same* op on rank-local values is right, forward
and backward; all collectives stand outside, between producer and consumer. `wanted` are the output
placements somebody downstream could use: a rule passes them through and need not invent them.

Two strategies need no rule and hold for every deterministic op: all inputs I give I, all inputs R
give R (each rank repeats the computation; gradients stay whole, or stay partial).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx

from ilm_compile.program.layout import MeshAxis, layout_of
from ilm_compile.program.placement import I, P, Placement, R, S

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
        for index, declared in enumerate(self.target._schema.arguments):
            if declared.name == name:
                return self.argument(index, name, declared.default_value)
        return None


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Rule = Callable[[Call, frozenset[Placement]], Iterator[Strategy]]
RULES: dict[Any, Rule] = {}
TAG_RULES: dict[torch.Tag, Rule] = {}  # of ops that others bring and tag
ROW_RULES: list[Rule] = []  # of any op that computes each row alone
OTHER_AXIS: dict[Any, Rule] = {}  # of functions that talk over an axis: their rule on the others


def rule_of(target: Any) -> Rule:
    """Return the rule of an op, found by the op or by its name; one that yields nothing if none is.

    Names serve ops of other libraries, which exist only once these are imported. Those that are
    tagged as pointwise have the rule of such ops.
    """
    schema = getattr(target, "_schema", None)
    found = RULES.get(target) or RULES.get(schema.name if schema else "")
    if found is None and schema is not None and target.namespace != "aten":
        found = next((TAG_RULES[tag] for tag in target.tags if tag in TAG_RULES), None)
    return found or _no_rule


def has_rule(target: Any) -> bool:
    """Whether an op has a placement rule."""
    return rule_of(target) is not _no_rule


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of each of `targets`."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def global_call(node: fx.Node, axis: MeshAxis) -> Call:
    """Return `node` as a call on global values, whether or not it was made rank-local already."""
    inputs = tensor_inputs(node)
    shapes = tuple(map(axis.shape, inputs))
    restore = GLOBAL_ARGUMENTS.get(node.target, _as_they_are)
    args, kwargs = restore(node, inputs, axis)
    shape, *further = axis.shapes(node)
    return Call(node, node.target, args, kwargs, shapes, shape, axis, tuple(further))


def _as_they_are(node: fx.Node, inputs: tuple[fx.Node, ...], axis: MeshAxis) -> Arguments:
    return node.args, dict(node.kwargs)


def _global_slice(node: fx.Node, inputs: tuple[fx.Node, ...], axis: MeshAxis) -> Arguments:
    source = inputs[0]
    x, dim, *bounds = node.args
    for name, placement in layout_of(source).shards(axis.sizes) if bounds else ():
        if placement.dim == dim % source.meta["val"].dim():
            bounds[:2] = [bound * axis.sizes[name] for bound in bounds[:2]]  # type: ignore[operator]
    return (x, dim, *bounds), dict(node.kwargs)


# How arguments that speak of local sizes are made global again; see `localize` for the other way.
GLOBAL_ARGUMENTS: dict[Any, Callable[[fx.Node, tuple[fx.Node, ...], MeshAxis], Arguments]] = {
    aten.slice.Tensor: _global_slice,
}


def tensor_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the tensor arguments of `node` in order, one entry per use."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return tuple(found)


def axis_of(call: Call | fx.Node) -> str:
    """Return the axis over which a function of the graph talks: its last argument."""
    return str(call.kwargs.get("axis") or call.args[-1])


def strategies(call: Call, wanted: Iterable[Placement]) -> list[Strategy]:
    """Return the distinct legal strategies of `call`, trivial ones first, in the same order always.

    Every rank searches for itself, and of equally good plans all must take the same one.
    """
    count = len(call.shapes)
    found = [Strategy((I,) * count, I)]
    if count:
        found.append(Strategy((R,) * count, R))
    is_elsewhere = call.target in OTHER_AXIS and axis_of(call) != call.axis.name
    rule = OTHER_AXIS[call.target] if is_elsewhere else rule_of(call.target)
    wanted = frozenset(wanted)
    for each in (rule, *ROW_RULES):
        found += sorted(each(call, wanted), key=repr)
    legal = (s for s in found if _divides(call, s))
    return list(dict.fromkeys(legal))


def plain_placements(shape: tuple[int, ...], size: int) -> set[Placement]:
    """Return I, R, P and every even sharding without segments of a value of this shape."""
    shards = {S(dim) for dim in range(len(shape))}
    return {I, R, P} | {p for p in shards if p.divides(shape, size)}


def _divides(call: Call, strategy: Strategy) -> bool:
    placed = [
        *zip(strategy.inputs, call.shapes, strict=True),
        *((strategy.output, shape) for shape in (call.shape, *call.further)),
    ]
    return all(placement.divides(shape, call.size) for placement, shape in placed)


def _no_rule(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    yield from ()

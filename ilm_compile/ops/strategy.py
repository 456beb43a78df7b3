"""The legal ways to place a call, and what it becomes on the values of one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import fx

from ilm_compile.ops.call import Call, LocalCall, Rule, Strategy, axis_of, tensor_inputs, unchanged
from ilm_compile.ops.spec import spec_of
from ilm_compile.program.layout import MeshAxis
from ilm_compile.program.placement import I, P, Placement, R, S

ROW_RULES: list[Rule] = []  # of any op that computes each row alone


def global_call(node: fx.Node, axis: MeshAxis) -> Call:
    """Return `node` as a call on global values, whether or not it was made rank-local already."""
    inputs = tensor_inputs(node)
    shapes = tuple(map(axis.shape, inputs))
    restore = spec_of(node.target).global_arguments
    args, kwargs = restore(node, inputs, axis) if restore else (node.args, dict(node.kwargs))
    shape, *further = axis.shapes(node)
    return Call(node, node.target, args, kwargs, shapes, shape, axis, tuple(further))


def localize(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    """Return (target, args, kwargs) that compute one rank's part of `call` under `strategy`."""
    local = spec_of(call.target).local
    return local(call, strategy, axis) if local else unchanged(call)


def strategies(call: Call, wanted: Iterable[Placement]) -> list[Strategy]:
    """Return the distinct legal strategies of `call`, trivial ones first, in the same order always.

    Every rank searches for itself, and of equally good plans all must take the same one.
    """
    count = len(call.shapes)
    spec = spec_of(call.target)
    found = [Strategy((I,) * count, I)]
    if count:
        found.append(Strategy((R,) * count, R))
    if spec.talks and axis_of(call) == call.axis.name:
        found = []
    elsewhere = spec.other_axis or (as_what_it_stands_for if spec.stands_for else None)
    rule = elsewhere if elsewhere and axis_of(call) != call.axis.name else spec.rule
    wanted = frozenset(wanted)
    for each in filter(None, (rule, *ROW_RULES)):
        found += sorted(each(call, wanted), key=repr)
    legal = (s for s in found if _divides(call, s))
    return list(dict.fromkeys(legal))


def as_what_it_stands_for(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """As the op that a sharded form stands for, as far as that needs no form of its own.

    Rows of a cross entropy whose vocabulary is cut may be cut once more; the vocabulary may not.
    """
    target, args = spec_of(call.target).stands_for(call.args)  # type: ignore[misc]
    whole = replace(call, target=target, args=args)
    for strategy in spec_of(target).rule(whole, wanted):  # type: ignore[misc]
        if localize(whole, strategy, call.axis.name)[0] is target:
            yield strategy


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

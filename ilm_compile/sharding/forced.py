"""Which op forced a large value to be made whole: what a missing rule costs, named.

A product whose result is larger than what went in (the logits of a vocabulary, a wide hidden layer)
is best left sharded along its width. Where it was gathered or summed up instead, some op further
on could not take it so. That op is found by walking on from the value with its width sharded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from ilm_compile.ops.call import tensor_inputs
from ilm_compile.ops.products import PRODUCTS
from ilm_compile.program.collectives import TRANSITIONS, WIRE
from ilm_compile.program.placement import Placement
from ilm_compile.sharding.solver import Solution


class Forced(NamedTuple):
    """A value that is made whole by `collective` on every rank, and the op that forced it."""

    value: fx.Node
    collective: str
    culprit: fx.Node


def forced_whole(solution: Solution) -> list[Forced]:
    """Return the large values that are made whole because an op cannot take them sharded.

    It reads shapes as they were before they are made rank-local.
    """
    found = []
    for node in solution.strategies:
        if node.target in PRODUCTS and _grows(node):
            collective = next(_made_whole(solution, node, set()), None)
            culprit = next(_stuck(solution, node, len(node.meta["val"].shape) - 1, set()), None)
            if collective and culprit:
                found.append(Forced(node, collective, culprit))
    return found


def _grows(node: fx.Node) -> bool:
    return bool(node.meta["val"].numel() > max(n.meta["val"].numel() for n in _operands(node)))


def _operands(node: fx.Node) -> list[fx.Node]:
    """The factors of a product that are no weights, all of them if there are only weights."""
    return [n for n in tensor_inputs(node) if n.op != "get_attr"] or list(tensor_inputs(node))


def _made_whole(solution: Solution, node: fx.Node, seen: set[fx.Node]) -> Iterator[str]:
    """Yield the collectives that make `node`, or what has its size after it, whole."""
    seen.add(node)
    source = solution.placements[node]
    for user in (user for user in node.users if user in solution.strategies):
        for value, target in zip(
            tensor_inputs(user), solution.strategies[user].inputs, strict=True
        ):
            if value is node and target.kind in "IR" and source.kind in "SP":
                name, move, _ = TRANSITIONS[source.kind, target.kind]
                if move in WIRE:
                    yield name
        if user not in seen and _size(user) == _size(node):
            yield from _made_whole(solution, user, seen)


def _stuck(
    solution: Solution, node: fx.Node, dim: int, seen: set[tuple[fx.Node, int]]
) -> Iterator[fx.Node]:
    """Yield the ops that cannot take `node`, or what follows from it, sharded along `dim`."""
    seen.add((node, dim))
    search = solution.search
    for user in (user for user in node.users if user in solution.strategies):
        options = search.choices[search.clusters[user]]
        positions = [i for i, value in enumerate(tensor_inputs(user)) if value is node]
        fitting = [o for o in options if any(_is_along(o.inputs[i], dim) for i in positions)]
        if not fitting:
            yield user
        for out in {option.output for option in fitting}:
            if out.is_shard and (user, out.dim) not in seen and _size(user) == _size(node):
                yield from _stuck(solution, user, out.dim, seen)


def _is_along(placement: Placement, dim: int) -> bool:
    return placement.is_shard and placement.dim == dim


def _size(node: fx.Node) -> int:
    val = node.meta["val"]
    return int(val.numel()) if hasattr(val, "numel") else -1

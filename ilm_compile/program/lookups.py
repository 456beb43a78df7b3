"""What a batch's integers pick: rows of tables and classes, and how many of them there are.

Read from the graph before any pass, so the sizes are the user's: a padded vocabulary would take an
id behind its end for one of the compiler's rows, and a sharded one answers zeros to any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ilm_compile.program.input_graph import graph_from_inputs
from ilm_compile.program.loss import cross_entropy_arguments
from ilm_compile.program.program import Lookup, Program

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Rule:
    """source, index: which arguments pick from what; dim: that the index counts along."""

    source: int
    index: int
    dim: int
    what: str


_RULES: dict[Any, _Rule] = {
    aten.embedding.default: _Rule(0, 1, 0, "rows"),
    aten.cross_entropy_loss.default: _Rule(0, 1, 1, "classes"),
    aten.nll_loss_nd.default: _Rule(0, 1, 1, "classes"),
}


def find_lookups(program: Program) -> Iterator[Lookup]:
    """Yield the lookups whose index follows from the inputs alone."""
    for node in program.calls():
        rule = _RULES.get(node.target)
        if rule is None:
            continue
        source, index = node.args[rule.source], node.args[rule.index]
        assert isinstance(source, fx.Node)
        assert isinstance(index, fx.Node)
        graph = None if index.meta["val"].is_floating_point() else graph_from_inputs(index)
        if graph is None:
            continue
        shape = source.meta["val"].shape
        yield Lookup(
            graph=graph,
            size=int(shape[rule.dim if len(shape) > rule.dim else -1]),
            ignored=cross_entropy_arguments(node)[2] if rule.dim else None,
            what=f"{rule.what} of {source.target if source.op == 'get_attr' else 'the loss'}",
            where=program.where(node),
        )

"""Token ids that stand for something else: an image's features are put where they are.

A model that scatters features over such tokens counts them, and refuses a batch with others. How
many there must be is in the graph: as many as there are features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from ilm_compile.program.program import Program

aten = torch.ops.aten
MOVED = {aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.to.dtype}


def place_marks(program: Program, batch: dict[str, Tensor]) -> None:
    """Put the marked ids into `batch`, in place: in each row as many as the graph has features."""
    for name, mark, count in _marks(program):
        ids = batch[name]
        ids[ids == mark] = 0 if mark else 1
        rows = ids.view(-1, ids.shape[-1])
        rows[:, 1 : 1 + count] = mark


def _marks(program: Program) -> Iterator[tuple[str, int, int]]:
    """Yield (input, id, how many in a row)."""
    for node in program.graph.find_nodes(op="call_function", target=aten.masked_scatter.default):
        mask, source = node.args[1], node.args[2]
        assert isinstance(mask, fx.Node)
        assert isinstance(source, fx.Node)
        while mask.target in MOVED:
            mask = mask.all_input_nodes[0]
        found = mask.all_input_nodes
        if mask.target is aten.eq.Scalar and found[0].op == "placeholder":
            wide = node.meta["val"].numel() // found[0].meta["val"].numel()
            rows = math.prod(found[0].meta["val"].shape[:-1])
            count = source.meta["val"].numel() // (wide * rows)
            yield str(found[0].target), int(mask.args[1]), count  # type: ignore[arg-type]

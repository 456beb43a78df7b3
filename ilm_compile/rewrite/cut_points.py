"""Where a program may be cut into pipeline stages: positions that few bytes cross."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import inf

import numpy as np
from torch import fx

from ilm_compile.ops.nodes import value_bytes
from ilm_compile.program.program import Program
from ilm_compile.program.values import is_tuple, tensors_of

# Stands for infinity in sums and differences, which stay exact: no real number of bytes reaches it.
_UNSENDABLE = 2.0**50


def crossing_bytes(calls: Sequence[fx.Node]) -> list[float]:
    """Return, for each position p, the bytes of the values made by ``calls[:p]`` and used later.

    `calls` are the calls that belong to a stage, in order. A value that is an output of the program
    is used by the last stage. A position that an integer would cross (a routing decision, say) gets
    infinity: such values have no gradient to send back, so a stage keeps them to itself. The same
    holds between an op with several results and the nodes that take them.
    """
    index = {node: position for position, node in enumerate(calls)}
    change = [0.0] * (len(calls) + 1)
    for made, node in enumerate(calls):
        used = max((index.get(user, len(calls) - 1) for user in node.users), default=made)
        if used <= made:
            continue
        is_sendable = not is_tuple(node) and all(
            v.is_floating_point() for v in tensors_of(node.meta.get("val"))
        )
        num_bytes = value_bytes(node) if is_sendable else _UNSENDABLE
        change[made + 1] += num_bytes
        change[used + 1] -= num_bytes
    total, crossing = 0.0, []
    for step in change[:-1]:
        total += step
        crossing.append(total if total < _UNSENDABLE else inf)
    return crossing


def cut_points(program: Program, calls: Sequence[fx.Node], seconds: Sequence[float]) -> list[int]:
    """Return the positions in `calls` before which a stage may begin, in order.

    In a block: the positions that the fewest bytes cross, in that block. A skip connection over
    several blocks therefore does not forbid cuts below it; it is relayed. Elsewhere (embedding,
    head): those crossed by no more bytes than the best cut in any block. Of positions with no cost
    in between, one is kept, at the start of a region if there is one.
    """
    crossing = crossing_bytes(calls)
    region = [node.meta["region"] for node in calls]
    # A cut belongs to the region it ends or divides: the end of a block is judged with its middle.
    ended = [-1, *region[:-1]]
    possible = [p for p in range(len(calls)) if 0 < crossing[p] < inf]
    blocks = {r for r in region if program.regions[r].is_block} or set(region)
    least: dict[int, float] = {}
    for p in possible:
        if ended[p] in blocks:
            least[ended[p]] = min(crossing[p], least.get(ended[p], inf))
    limit = min(least.values(), default=inf)
    allowed = [p for p in possible if crossing[p] <= least.get(ended[p], limit)]
    before = np.concatenate([[0.0], np.cumsum(seconds)])
    return [
        max(group, key=lambda p: region[p] != region[p - 1])
        for cost, group in groupby(allowed, before.__getitem__)
        if 0 < cost < before[-1]
    ]

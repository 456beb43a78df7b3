"""Regions: the graph divided into its transformer blocks and what lies before, between and after.

A block is one item of the repeated container (an ``nn.ModuleList`` such as ``layers``) in which the
model does most of its calls. Regions are what recompute, FSDP and torch.compile work on.
"""

from __future__ import annotations

import re
from collections import Counter

from torch import fx

from ilm_compile.program.program import Program, Region

_ITEM = re.compile(r"^(?P<container>(?:[^.]+\.)*?[^.\d][^.]*)\.(?P<index>\d+)(?:\.|$)")


def find_regions(program: Program) -> None:
    """Set `program.regions` and every call node's ``meta["region"]``, in graph order.

    Nodes outside all blocks belong to "prologue" before the first block, to "epilogue" after the
    last, and to the block they follow in between, so that each region is one run of nodes.
    """
    calls = list(program.calls())
    containers = Counter(c for node in calls if (c := _container(program, node)))
    main = containers.most_common(1)[0][0] if containers else None
    blocks = [_item(program, node, main) for node in calls]
    last = max((i for i, block in enumerate(blocks) if block), default=-1)
    current, names = "prologue", ["prologue"]
    for position, (node, block) in enumerate(zip(calls, blocks, strict=True)):
        if position > last:
            current = "epilogue"
        elif block and block not in names:
            current = block
        if current not in names:
            names.append(current)
        node.meta["region"] = names.index(current)
    program.regions = [Region(name, is_block=name in blocks) for name in names]


def _container(program: Program, node: fx.Node) -> str | None:
    match = _ITEM.match(program.source(node).module_path)
    return match["container"] if match else None


def _item(program: Program, node: fx.Node, container: str | None) -> str | None:
    match = _ITEM.match(program.source(node).module_path)
    if match is None or match["container"] != container:
        return None
    return f"{match['container']}.{match['index']}"

"""Which calls of a block run again in its backward, so that the fewest bytes are kept.

A minimum cut between what must be there (inputs of the block, results of products, of attention, of
collectives, and what draws random numbers) and what the backward needs. A value costs its bytes if
it is kept, a call what it moves if it runs again, so many bytes moved for a byte kept.
(So does the partitioner of torch.compile, which puts no price on what runs again.)
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem

import networkx as nx
import torch
from torch import fx

from ilm_compile.cost.flops import forward_flops
from ilm_compile.cost.roofline import node_bytes
from ilm_compile.cost.saved import SavedMemory, Storage
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.layout import Sizes
from ilm_compile.program.remade import AGAIN, NEEDED, ON_THE_WAY
from ilm_compile.program.traffic import traffic
from ilm_compile.program.values import tensors_of
from ilm_compile.rewrite.parameter_free import is_random

# Bytes moved that are worth one byte that is not kept. Elementwise chains cost 2 to 4; to run a
# whole block again costs about 20 on an H100.
PRICE = 8
_NEEDED, _GIVEN = "needed", "given"


def mark_again(memory: SavedMemory, nodes: Sequence[fx.Node], sizes: Sizes) -> None:
    """Mark which of `nodes`, the calls of a block or of a part of one, run again in backward.

    sizes: of the mesh axes. See `ilm_compile.program.remade` for the marks.
    """
    for node, mark in calls_again(memory, nodes, sizes).items():
        node.meta[AGAIN] = mark


def calls_again(memory: SavedMemory, nodes: Sequence[fx.Node], sizes: Sizes) -> dict[fx.Node, str]:
    """Return the calls that run again, in order, with their marks."""
    needed = {s for s in memory.of(nodes) if s.place >= 0}
    made = _made_again(memory, nodes, needed, sizes)
    inside, found = set(nodes), dict[fx.Node, str]()
    pending = [n for n in nodes if not made.isdisjoint(_own(memory, n) & needed)]
    found.update(dict.fromkeys(pending, NEEDED))
    while pending:
        for source in pending.pop().all_input_nodes:
            if (
                source in inside
                and source not in found
                and made.issuperset(memory.storages(source))
            ):
                found[source] = ON_THE_WAY
                pending.append(source)
    return {node: found[node] for node in nodes if node in found}


def _own(memory: SavedMemory, node: fx.Node) -> set[Storage]:
    """What is first held by this node, an item of several results by the node that takes it."""
    source = node.all_input_nodes[0] if node.target is getitem else node
    of_several = isinstance(node.meta.get("val"), tuple | list)
    return set() if of_several else {s for s in memory.storages(node) if s.node is source}


def _made_again(
    memory: SavedMemory, nodes: Sequence[fx.Node], needed: set[Storage], sizes: Sizes
) -> set[Storage]:
    """Return the storages on the far side of the minimum cut."""
    numbers: dict[object, int] = {}  # whole numbers, whose order in sets is always the same

    def number(thing: object) -> int:
        return numbers.setdefault(thing, len(numbers))

    graph, known = nx.DiGraph(), dict[Storage, None]()
    graph.add_nodes_from((number(_GIVEN), number(_NEEDED)))
    for node in nodes:
        own = [s for s in memory.storages(node) if s.node is node]
        inputs = [s for source in node.all_input_nodes for s in memory.storages(source)]
        known |= dict.fromkeys((*own, *inputs))
        if not own:
            continue  # a view, which costs nothing
        call = number(node)
        price = {"capacity": node_bytes(node)} if can_repeat(node, sizes) else {}
        graph.add_edge(number(_GIVEN), call, **price)
        graph.add_edges_from((number((s, "kept")), call) for s in inputs)
        graph.add_edges_from((call, number(s)) for s in own)
    inside = set(nodes)
    for storage in known:
        capacity = PRICE * storage.num_bytes
        graph.add_edge(number(storage), number((storage, "kept")), capacity=capacity)
        if storage.node not in inside:
            graph.add_edge(number(_GIVEN), number(storage))
        if storage in needed:
            graph.add_edge(number((storage, "kept")), number(_NEEDED))
    if not needed:
        return set()
    _, (_, far) = nx.minimum_cut(graph, number(_GIVEN), number(_NEEDED))
    return {storage for storage in known if number(storage) in far}


def can_repeat(node: fx.Node, sizes: Sizes) -> bool:
    """Whether a call may run twice: cheap, alone, and with the same result.

    What was sent once is kept: a second message would take a link that is busy in backward.
    Integers and what they decide are found once.
    """
    is_function = not isinstance(node.target, torch._ops.OpOverload)
    if is_function and node.target not in (redistribute, getitem):
        return False
    values = tensors_of(node.meta["val"])
    return (
        not is_random(node)
        and not forward_flops(node)
        and not traffic(node, sizes, has_gradient=False)
        and all(v.is_floating_point() or v.is_complex() or v.dtype == torch.bool for v in values)
    )

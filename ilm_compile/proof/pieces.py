"""A compiled program cut into pieces, each beside the piece of the traced graph that it stands for.

The cuts are where a value that depends on parameters passes from one region to another: an anchor.
Each anchor of the program is recognised in the traced graph by its name, through the collectives
and casts behind it. If every piece computes the same as its counterpart, from the same anchors, the
programs are equal: what one piece takes is by name what another one makes. A value that the traced
graph does not have is no anchor, and the pieces on both sides of it are proven as one. What no
parameter reaches, masks and rotary tables, belongs to every piece that uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from ilm_compile.program.collectives import redistribute
from ilm_compile.program.gradients import wanted_gradients
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program
from ilm_compile.program.values import name_of, shapes_of

SEEN_THROUGH = {redistribute, torch.ops.aten.to.dtype}


@dataclass(frozen=True, slots=True)
class Anchor:
    """A value that both graphs have. `trained`: a gradient comes back to it from the loss."""

    node: fx.Node  # of the compiled program
    origin: fx.Node  # of the traced graph
    trained: bool


@dataclass(frozen=True, slots=True)
class Slice:
    """The calls that lead from `inputs`, anchors of other pieces, to `outputs`, in graph order."""

    calls: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What makes `outputs` of `inputs`, anchors that other pieces make.

    `names` are those of the program's own outputs, the loss first; empty elsewhere.
    """

    region: str
    inputs: tuple[Anchor, ...]
    outputs: tuple[Anchor, ...]
    names: tuple[str, ...]
    traced: Slice
    compiled: Slice


def pieces(traced: Program, program: Program) -> Iterator[Piece]:
    """Yield the pieces of `program` in order; together they hold every call that it needs."""
    anchors = {anchor.node: anchor for anchor in _anchors(traced, program)}
    by_region: dict[int, list[Anchor]] = {}
    for node, anchor in anchors.items():
        by_region.setdefault(node.meta["region"], []).append(anchor)
    known: set[fx.Node] = set()  # made by an earlier piece: a later one may pass them on
    for region, made in sorted(by_region.items()):
        yield _piece(program.regions[region].name, made, (), anchors, known)
        known |= {anchor.origin for anchor in made}
    final = [
        Anchor(node, origin, trained=not index)
        for index, (node, origin) in enumerate(zip(program.outputs, traced.outputs, strict=True))
    ]
    yield _piece(program.regions[-1].name, final, program.output_names, anchors, known)


def _piece(
    region: str,
    outputs: list[Anchor],
    names: tuple[str, ...],
    anchors: dict[fx.Node, Anchor],
    known: set[fx.Node],
) -> Piece:
    ends = [] if names else outputs  # one anchor of a piece may lead to another one of it
    own, origins = {a.node for a in ends}, {a.origin for a in ends} - known
    compiled = _slice([a.node for a in outputs], set(anchors) - own)
    stops = {anchor.origin for anchor in anchors.values()} - origins
    return Piece(
        region,
        tuple(anchors[node] for node in compiled.inputs),
        tuple(outputs),
        names,
        _slice([a.origin for a in outputs], stops),
        compiled,
    )


def _anchors(traced: Program, program: Program) -> Iterator[Anchor]:
    originals = {node.name: node for node in traced.calls()}
    wanted = wanted_gradients(traced.graph)
    reached = _reached(program)
    for node in program.calls():
        if node not in reached or not _crosses(node):
            continue
        source = node
        while name_of(source) not in originals and source.target in SEEN_THROUGH:
            source = source.all_input_nodes[0]
        origin = originals.get(name_of(source))
        if origin is not None and _alike(origin, node, program):
            yield Anchor(node, origin, origin in wanted)


def _crosses(node: fx.Node) -> bool:
    """Whether another region uses `node`; a tuple goes nowhere, its items do."""
    region = node.meta["region"]
    values = node.meta["val"]
    is_one = isinstance(values, torch.Tensor) and values.is_floating_point()
    return is_one and any(user.meta.get("region", region) != region for user in node.users)


def _alike(origin: fx.Node, node: fx.Node, program: Program) -> bool:
    """Whether both may be the same value: of one shape, but for a padded vocabulary."""
    (ours, *_), (theirs, *_) = shapes_of(node), shapes_of(origin)
    ours = layout_of(node).global_shape(ours, program.plan.axes)
    return len(ours) == len(theirs) and all(a >= b for a, b in zip(ours, theirs, strict=True))


def _reached(program: Program) -> set[fx.Node]:
    """Return the calls that depend on a parameter, be it frozen."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        is_parameter = node.op == "get_attr" and program.variables[str(node.target)].is_parameter
        if is_parameter or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _slice(outputs: list[fx.Node], stops: set[fx.Node]) -> Slice:
    needed: set[fx.Node] = set()
    inputs: dict[fx.Node, None] = {}
    pending = list(outputs)
    while pending:
        node = pending.pop()
        if node in stops:
            inputs[node] = None
        elif node not in needed:
            needed.add(node)
            pending += node.all_input_nodes
    order = [node for node in outputs[0].graph.nodes if node in needed or node in inputs]
    return Slice(
        tuple(node for node in order if node in needed),
        tuple(node for node in order if node in inputs),
        tuple(outputs),
    )


def extract(program: Program, part: Slice) -> fx.GraphModule:
    """Return `part` as a graph of its own: the anchors it takes are placeholders by their names.

    Nodes keep their names and meta; parameters and buffers stay `get_attr` nodes.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in part.inputs:
        copied[node] = graph.create_node("placeholder", node.name, name=node.name)
        copied[node].meta = dict(node.meta)
    for node in part.calls:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    graph.output(tuple(copied[node] for node in part.outputs))
    return fx.GraphModule(program.graph_module, graph)

"""A program on other sizes: the same nodes, with every shape and every size among the arguments
changed as `ilm_compile.proof.smaller` decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import fx

from ilm_compile.program.copy import copy_program
from ilm_compile.program.layout import Layout, layout_of
from ilm_compile.program.loss import NUM_TARGETS
from ilm_compile.program.placement import Placement
from ilm_compile.program.program import Count, Input, Program
from ilm_compile.program.query_attention import parts_of
from ilm_compile.program.values import tensors_of
from ilm_compile.proof.dims import END, Dims, op_name
from ilm_compile.proof.numbers import sizes_of
from ilm_compile.proof.place_relations import places_of
from ilm_compile.proof.smaller import Change, Sizes

aten = torch.ops.aten


def resized(program: Program, sizes: Sizes, dims: dict[fx.Node, list[Dims]]) -> Program:
    """Return a copy of `program`, whose values have dimensions `dims`, on the new sizes."""
    result = copy_program(program)
    old = list(program.graph.nodes)
    new = list(result.graph.nodes)
    axes = sizes_of(program)
    change = _Resizer(sizes, {b: dims[a] for a, b in zip(old, new, strict=True)}, axes)
    for before, node in zip(old, new, strict=True):
        if node.op != "output":
            change.node(node, dims[before], [dims[n] for n in before.all_input_nodes])
    targets = {str(n.target): n for n in new if n.op == "placeholder"}
    result.inputs = {
        name: Input(tuple(targets[name].meta["val"].shape), spec.dtype) if name in targets else spec
        for name, spec in result.inputs.items()
    }
    for node, before in zip(new, old, strict=True):
        if node.op == "get_attr":
            change.variable(result, node, dims[before][0])
    result.output_widths = {
        name: change.dim(dims[before][0][-1]).of(program.output_widths[name])
        for name, before in zip(program.output_names, program.outputs, strict=True)
        if name in program.output_widths
    }
    _cut_constants(result)
    result.target_counts = {
        name: _recount(name, count, {node.name: node for node in new})
        for name, count in program.target_counts.items()
    }
    result.finish()
    return result


def _recount(name: str, count: Count, nodes: Mapping[str, fx.Node]) -> Count:
    """Return what counts for the placeholder `name`, with the sizes its calls have in `nodes`.

    Targets are counted with calls of the program. What else is counted has calls of its own, whose
    sizes nothing tells: some number stands for it, the same in both programs that are compared.
    """
    result, graph, val = fx.Graph(), count.graph, nodes[name].meta["val"]
    if count.inputs and not name.startswith(NUM_TARGETS):
        call = (list(val.shape), 3), {"dtype": val.dtype}
        result.output(result.call_function(aten.full.default, *call))
        return replace(count, graph=fx.GraphModule(graph, result))
    copied: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        copied[node] = result.node_copy(node, copied.__getitem__)
        resized_node = nodes.get(node.name)
        if node.op == "call_function" and resized_node and resized_node.target is node.target:
            sources = iter([copied[source] for source in node.all_input_nodes])
            by_old = dict(zip(resized_node.all_input_nodes, sources, strict=False))
            copied[node].args = fx.node.map_arg(resized_node.args, by_old.__getitem__)
            copied[node].kwargs = fx.node.map_arg(resized_node.kwargs, by_old.__getitem__)
    return replace(count, graph=fx.GraphModule(graph, result))


class _Resizer:
    def __init__(
        self, sizes: Sizes, dims: Mapping[fx.Node, list[Dims]], axes: Mapping[str, int]
    ) -> None:
        """dims: of the new graph's nodes. axes: the ranks of each."""
        self.sizes, self.dims, self.axes = sizes, dims, axes

    def places(self, node: fx.Node) -> Dims:
        """Return the dimensions of a value of the new graph."""
        return self.dims[node][0]

    def of(self, root: int) -> Change:
        return self.sizes.changes.get(root, Change())

    def dim(self, number: int) -> Change:
        return self.of(self.sizes.classes.find(number))

    def local(self, number: int) -> int:
        """Return the new size that a rank holds."""
        classes = self.sizes.classes
        count = classes.sizes[number] // classes.locals[number] if classes.locals[number] else 1
        return self.dim(number).of(classes.sizes[number]) // count

    def node(self, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]) -> None:
        values = [
            value.new_empty([self.local(d) for d in each])
            for value, each in zip(tensors_of(node.meta["val"]), dims, strict=True)
        ]
        node.meta["val"] = tuple(values) if isinstance(node.meta["val"], tuple) else values[0]
        if "layout" in node.meta:
            node.meta["layout"] = self.layout(node.meta["layout"], dims[0])
        if node.op == "call_function" and (rewrite := ARGUMENTS.get(op_name(node))):
            rewrite(self, node, dims, inputs)

    def layout(self, layout: Layout, dims: Dims) -> Layout:
        return Layout.of(
            {
                axis: self.placement(place, dims, layout.parts_before(axis, self.axes))
                for axis, place in layout.placed
            }
        )

    def placement(self, place: Placement, dims: Dims, parts: int = 1) -> Placement:
        """Return a placement of one of `parts` parts of a value."""
        if not place.segments:
            return place
        change = self.dim(dims[place.dim])
        new = [change.of(end * parts) // parts for end in accumulate(place.segments, initial=0)]
        return replace(place, segments=tuple(b - a for a, b in pairwise(new)))

    def variable(self, program: Program, node: fx.Node, dims: Dims) -> None:
        classes, variable = self.sizes.classes, program.variables[str(node.target)]
        shape = tuple(self.dim(d).of(classes.sizes[d]) for d in dims)
        rows = variable.shape[0] - variable.padding if variable.padding else 0
        padding = shape[0] - self.dim(dims[0]).of(rows) if variable.padding else 0
        layout = self.layout(variable.layout, dims)
        hooks, users = variable.gradient_hooks, (shape[0] - padding, *shape[1:]) if shape else ()
        if users != variable.user_shape:
            hooks = tuple(hook.resized(users) for hook in hooks)
        program.variables[variable.name] = replace(
            variable,
            shape=shape,
            padding=padding,
            layout=layout,
            gradient_hooks=hooks,
        )


def _cut_constants(program: Program) -> None:
    """Give constants of the graph, which have values, their new sizes."""
    for node in program.graph.find_nodes(op="get_attr"):
        owner, _, leaf = str(node.target).rpartition(".")
        module = program.graph_module.get_submodule(owner)
        value = getattr(module, leaf)
        shape = node.meta["val"].shape
        if not value.is_meta and value.shape != shape:
            module._buffers[leaf] = value[tuple(map(slice, shape))].contiguous()


Rewrite = Callable[[_Resizer, fx.Node, list[Dims], list[list[Dims]]], None]


def _argument(node: fx.Node, index: int, value: Any) -> None:
    node.args = (*node.args[:index], value, *node.args[index + 1 :])


def _shape_at(index: int) -> Rewrite:
    def rewrite(run: _Resizer, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]) -> None:
        _argument(node, index, list(node.meta["val"].shape))

    return rewrite


def _arange(run: _Resizer, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]) -> None:
    step: Any = node.args[2] if len(node.args) > 2 else 1
    if len(node.args) == 1 or node.args[0] == 0:
        _argument(node, min(1, len(node.args) - 1), node.meta["val"].shape[0] * step)


def _slice(run: _Resizer, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]) -> None:
    names = ("dim", "start", "end", "step")
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    dim = cast(int, given.get("dim", 0)) % len(dims[0])
    number = inputs[0][0][dim]
    classes, change = run.sizes.classes, run.dim(number)
    size, local = classes.sizes[number], classes.locals[number]
    count = size // local
    bounds = []
    for name, default in (("start", 0), ("end", END)):
        bound: Any = given.get(name)
        bound = default if bound is None else bound
        is_offset = name == "start" and 0 <= bound < cast(int, given.get("step", 1)) and bound
        if bound >= END or is_offset:
            bounds.append(bound)
            continue
        place = bound * count + (size if bound < 0 else 0)
        bounds.append(change.of(min(place, size)) // count)
    node.args = (node.args[0], dim, *bounds, given.get("step", 1))
    node.kwargs = {}


def _bound(run: _Resizer, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]) -> None:
    found = places_of(node.args[0])
    if found is not None and found[2] == 1 and isinstance(bound := node.args[1], int):
        number = run.places(found[0])[found[1]]
        if 0 < bound < run.sizes.classes.sizes[number]:
            _argument(node, 1, run.dim(number).of(bound))


def _norm(run: _Resizer, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]) -> None:
    count = len(node.args[1])  # type: ignore[arg-type]
    _argument(node, 1, list(node.meta["val"].shape[-count:]))


def _padding_index(
    run: _Resizer, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]
) -> None:
    if len(node.args) > 2 and cast(int, node.args[2]) >= 0:
        rows = inputs[0][0][0]
        last = run.dim(rows).of(run.sizes.classes.sizes[rows]) - 1
        _argument(node, 2, min(cast(int, node.args[2]), last))


def _moved(run: _Resizer, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]) -> None:
    """Placements written as text."""
    axis = str(node.kwargs["axis"])
    for key in ("src", "dst"):
        place = Placement.parse(str(node.kwargs[key]))
        parts = layout_of(node).with_placement(axis, place).parts_before(axis, run.axes)
        node.kwargs = {**node.kwargs, key: str(run.placement(place, inputs[0][0], parts))}


def _queries(run: _Resizer, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]) -> None:
    """The placement of the queries, third from the end, on the axis that is the last argument."""
    place, axis = Placement.parse(str(node.args[-3])), str(node.args[-1])
    parts = layout_of(node).parts_before(axis, run.axes)
    _argument(node, len(node.args) - 3, str(run.placement(place, inputs[0][0], parts)))


def _boundaries(run: _Resizer, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]) -> None:
    """Rows and tokens of the keys that they are for."""
    user = next(iter(node.users))
    q, k = (run.dims[cast(fx.Node, each)][0] for each in user.args[:2])
    rows, tokens = (run.local(d) for d in k[:2])
    _argument(node, 1, rows)
    _argument(node, 2, tokens * parts_of(user))
    if op_name(node) == "ilm::query_boundaries":
        axis = str(node.args[4])
        parts = layout_of(user).parts_before(axis, run.axes)
        place = run.placement(Placement.parse(str(node.args[3])), q, parts)
        _argument(node, 3, str(place))


def _dropout(run: _Resizer, node: fx.Node, dims: list[Dims], inputs: list[list[Dims]]) -> None:
    _argument(node, 4, str(run.layout(Layout.parse(str(node.args[4])), inputs[0][0])))


ARGUMENTS: dict[str, Rewrite] = {
    **dict.fromkeys(("reshape", "expand"), _shape_at(1)),
    **dict.fromkeys(("full", "zeros", "ones", "empty"), _shape_at(0)),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty"), _shape_at(1)),
    "arange": _arange,
    "slice": _slice,
    **dict.fromkeys(("ge", "gt", "le", "lt", "eq", "ne"), _bound),
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm),
    **dict.fromkeys(("embedding", "vocab_embedding"), _padding_index),
    **dict.fromkeys(("redistribute", "route"), _moved),
    **dict.fromkeys(("ilm::query_attention", "ilm::query_dot_product_attention"), _queries),
    **dict.fromkeys(("ilm::document_boundaries", "ilm::query_boundaries"), _boundaries),
    "seeded_dropout": _dropout,
}

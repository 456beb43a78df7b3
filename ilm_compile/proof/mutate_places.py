"""What the kinds of faults share: where a fault may be, and how a copy of a program is edited.

Each kind yields the places where it applies to a given program. An edit changes a copy of that
program and keeps its books (placements, shapes, regions) in order, as a wrong pass would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.arguments import place_of
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.copy import copy_program
from ilm_compile.program.gradients import wanted_gradients
from ilm_compile.program.layout import Layout, layout_of
from ilm_compile.program.program import Program
from ilm_compile.program.values import run_without_data, tensors_of, without_data
from ilm_compile.rewrite.parameter_free import parameter_free_nodes

Edit = Callable[[Program, fx.Node], None]
Place = tuple[fx.Node, str, Edit]  # where, more words about it, and what to do there
Kind = Callable[[Program], Iterator[Place]]
Make = Callable[[fx.Node], fx.Node]  # what one user of a value is given in its place
aten, ilm = torch.ops.aten, torch.ops.ilm
CAST = aten.to.dtype
KEPT = ("region", "stage", "source", "clone")


def mutated(program: Program, node: fx.Node, edit: Edit) -> Program:
    """Return a copy of `program` on which `edit` was done at the copy of `node`."""
    position = list(program.graph.nodes).index(node)
    result = copy_program(program)
    edit(result, list(result.graph.nodes)[position])
    result.finish()
    return result


def collectives(program: Program) -> list[fx.Node]:
    """The collectives, in graph order."""
    return list(program.graph.find_nodes(op="call_function", target=redistribute))


def parameters(program: Program) -> list[fx.Node]:
    """The parameters that something uses, in graph order."""
    nodes = program.graph.find_nodes(op="get_attr")
    return [n for n in nodes if program.variables[str(n.target)].is_parameter and n.users]


def inputs(program: Program, *words: str) -> list[fx.Node]:
    """The inputs in whose names one of `words` is."""
    nodes = program.graph.find_nodes(op="placeholder")
    return [n for n in nodes if any(word in str(n.target) for word in words) and n.users]


def calls(program: Program, *targets: object) -> list[fx.Node]:
    """The calls of `targets`, in graph order."""
    return [node for node in program.calls() if node.target in targets]


def counts(program: Program) -> list[fx.Node]:
    """The inputs that say how many targets there are."""
    nodes = program.graph.find_nodes(op="placeholder")
    return [node for node in nodes if str(node.target) in program.target_counts and node.users]


def users_of(node: fx.Node) -> list[fx.Node]:
    """The users of `node` in graph order, which a copy of the graph keeps."""
    return [user for user in node.graph.nodes if user in node.users]


def value_of(node: fx.Node) -> Tensor | None:
    """The one tensor that `node` gives, as the graph knows it."""
    values = tensors_of(node.meta.get("val"))
    return values[0] if len(values) == 1 else None


def is_float(node: fx.Node) -> bool:
    """Whether `node` gives one tensor, of floating point."""
    value = value_of(node)
    return value is not None and value.is_floating_point()


def differentiable(program: Program) -> list[fx.Node]:
    """The calls through which a gradient of the loss comes to a parameter."""
    wanted = wanted_gradients(program.graph)
    return [node for node in program.calls() if node in wanted and is_float(node)]


def without_parameters(program: Program) -> list[fx.Node]:
    """The calls that no parameter reaches, in graph order: positions, masks, rotary tables."""
    free = parameter_free_nodes(program)
    return [node for node in program.calls() if node in free]


def set_argument(node: fx.Node, name: str, value: Any) -> None:
    """Set the argument of an op by its name in the schema."""
    place = place_of(node.target, name)
    assert place is not None, name
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def put(
    program: Program,
    point: fx.Node,
    target: Any,
    *args: Any,
    placed: Layout | None = None,
    **kwargs: Any,
) -> fx.Node:
    """Insert a call before `point`, in its region and stage, and return it."""
    graph = program.graph
    like = point if point.op == "call_function" else program.outputs[0]
    with graph.inserting_before(point):
        node = graph.call_function(target, args, kwargs)
    node.meta = {key: like.meta[key] for key in KEPT if key in like.meta}
    with torch.no_grad(), torch.device("meta"):
        node.meta["val"] = without_data(run_without_data(node))
    if placed is not None:
        node.meta["layout"] = placed
    return node


def reroute(program: Program, node: fx.Node, make: Callable[[fx.Node], fx.Node]) -> None:
    """Give each user of `node` what `make(user)` inserts before it."""
    for user in users_of(node):
        user.replace_input_with(node, make(user))


def like(program: Program, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> Make:
    """Return what gives a user ``target(node, *args)``, placed as `node` is."""
    placed = layout_of(node) if "layout" in node.meta else None
    return lambda user: put(program, user, target, node, *args, placed=placed, **kwargs)


def leave_out(program: Program, node: fx.Node) -> None:
    """The edit by which what `node` takes goes on as it is."""
    node.replace_all_uses_with(node.all_input_nodes[0])


def rerouted(target: Any, *args: Any, **kwargs: Any) -> Edit:
    """Return the edit that puts ``target(value, *args)`` in the place of a value everywhere."""

    def edit(program: Program, node: fx.Node) -> None:
        reroute(program, node, like(program, node, target, *args, **kwargs))

    return edit

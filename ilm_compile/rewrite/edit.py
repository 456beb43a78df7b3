"""Rewriting: insert and replace calls so that the program stays complete.

A call needs more than a target and arguments: its region, stage and source, the shape of its value
(``val``) and, once the program is sharded, its placement. These functions fill all of it in. The
place comes from the node next to which a call is inserted, the value from running the op without
data, and the placement from the rule of the op, by its inputs. Where no rule gives one they raise
`ProgramError`, since a guessed placement is a silent gradient bug.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.errors import ProgramError
from ilm_compile.ops.call import tensor_inputs
from ilm_compile.ops.strategy import global_call, plain_placements
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.communicator import shape_communicators
from ilm_compile.program.expert_rows import route
from ilm_compile.program.layout import INVARIANT, Layout, MeshAxis, Sizes, layout_of
from ilm_compile.program.placement import I, Placement, R
from ilm_compile.program.program import Program
from ilm_compile.program.values import (
    run_without_data,
    shapes_of,
    take_name,
    tensors_of,
    without_data,
)
from ilm_compile.rewrite.pattern import Function, Match, matches, parameters_of, trace_function
from ilm_compile.sharding import Strategy, strategies
from ilm_compile.sharding.check import solved_axes

KEPT = ("region", "stage", "clone", "source")  # what a new call takes over from its neighbour


def nodes_in(program: Program, path: str) -> list[fx.Node]:
    """Return the calls made in the modules that `path` names and below them, in graph order.

    `path` is a module path whose parts may hold wildcards, such as ``layers.*.feed_forward``; a
    wildcard never reaches over a dot. ``""`` is the whole program.
    """
    wanted = path.split(".") if path else []

    def is_in(node: fx.Node) -> bool:
        parts = program.source(node).module_path.split(".")
        return len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))

    return [node for node in program.calls() if is_in(node)]


def insert_before(
    program: Program, node: fx.Node, target: Any, /, *args: Any, **kwargs: Any
) -> fx.Node:
    """Insert the call ``target(*args, **kwargs)`` before `node` and return it."""
    return _insert(program, node, _neighbour(program, node), target, args, kwargs)


def insert_like(
    program: Program, node: fx.Node, like: fx.Node, target: Any, /, *args: Any, **kwargs: Any
) -> fx.Node:
    """As `insert_before`, placed as `like` is wherever the rule of the op allows it."""
    neighbour = _neighbour(program, node)
    return _insert(program, node, neighbour, target, args, kwargs, like.meta.get("layout"))


def insert_after(
    program: Program, node: fx.Node, target: Any, /, *args: Any, **kwargs: Any
) -> fx.Node:
    """Insert the call ``target(*args, **kwargs)`` after `node` and return it.

    Who used `node` still does; see `wrap`. After an input or a parameter means before its first
    user, so that the call belongs to the region that needs it.
    """
    point, like = _after(program, node)
    return _insert(program, point, like, target, args, kwargs)


def create_cast(program: Program, value: fx.Node, dtype: torch.dtype, *, near: fx.Node) -> fx.Node:
    """Create a cast of `value`, placed as it is, where the graph inserts; it belongs to `near`."""
    cast = program.graph.call_function(torch.ops.aten.to.dtype, (value, dtype))
    cast.meta.update({key: near.meta[key] for key in KEPT if key in near.meta})
    if "layout" in value.meta:
        cast.meta["layout"] = value.meta["layout"]
    cast.meta["val"] = value.meta["val"].to(dtype)
    return cast


def replace_call(
    program: Program, node: fx.Node, target: Any, /, *args: Any, **kwargs: Any
) -> fx.Node:
    """Put the call ``target(*args, **kwargs)`` in the place of call `node` and return it."""
    wanted = node.meta.get("layout")
    new = _insert(program, node, node, target, args, kwargs, wanted)
    return _take_over(program, node, new)


def wrap(program: Program, node: fx.Node, function: Function) -> fx.Node:
    """Give everyone who uses `node` the value ``function(node)`` instead, and return it.

    `function` is an ordinary function of one tensor, traced for the shape and dtype of `node`.
    """
    users = set(node.users)
    point, like = _after(program, node)
    graph = trace_function(lambda x: function(x), {"x": without_data(node.meta["val"])})
    new = _inline(program, graph, {"x": node}, point, like, node.meta.get("layout"))
    _refuse_other_type(program, node, new)
    node.replace_all_uses_with(new, delete_user_cb=users.__contains__)
    return new


def replace(
    program: Program,
    pattern: Function,
    replacement: Function,
    *,
    where: Callable[[Match], bool] | None = None,
) -> list[fx.Node]:
    """Replace each match of `pattern` by `replacement` and return the nodes of the results.

    `pattern` as in `ilm_compile.rewrite.pattern`; `replacement` is a function too, of parameters
    with the same names (it may leave some out), and is traced for the shapes, dtypes and scalars of
    each match. `where` picks matches. Raises `ProgramError`, before anything is changed, if a value
    inside a match is used outside it as well.
    """
    found = [match for match in matches(program, pattern) if where is None or where(match)]
    for match in found:
        _refuse_escaping(program, match)
    current: dict[Any, fx.Node] = {}  # the result of an earlier match may be an input of a later
    traced: dict[str, fx.Graph] = {}
    results = []
    for match in found:
        inputs = {
            name: current.get(value, value) if isinstance(value, fx.Node) else value
            for name, value in _select(replacement, match.inputs).items()
        }
        examples = {
            name: without_data(value.meta["val"]) if isinstance(value, fx.Node) else value
            for name, value in inputs.items()
        }
        key = repr([(v, v.stride()) if isinstance(v, Tensor) else v for v in examples.values()])
        if key not in traced:
            traced[key] = trace_function(replacement, examples)
        wanted = match.output.meta.get("layout")
        new = _inline(program, traced[key], inputs, match.output, match.output, wanted)
        current[match.output] = _take_over(program, match.output, new)
        for node in reversed(match.nodes[:-1]):
            if not node.users:
                program.graph.erase_node(node)
        results.append(new)
    return results


def _refuse_escaping(program: Program, match: Match) -> None:
    for node in match.escaping:
        outside = next(user for user in node.users if user not in match.nodes)
        raise ProgramError(
            f"replace: {program.where(node)} is inside a match that ends in {match.output.name}, "
            f"but {outside.name} uses it too; expected inner values to stay inside. Leave such "
            "matches out with where=lambda match: not match.escaping"
        )


def _select(replacement: Function, inputs: dict[str, Any]) -> dict[str, Any]:
    names = list(parameters_of(replacement))
    if unknown := [name for name in names if name not in inputs]:
        raise ProgramError(
            f"replace: the replacement takes {unknown}, which the pattern does not have; its "
            f"parameters are {list(inputs)}"
        )
    return {name: inputs[name] for name in names}


def _neighbour(program: Program, node: fx.Node) -> fx.Node:
    """Return the call from which a call before `node` takes its region, stage and source."""
    if node.op == "output":
        return program.outputs[0]
    return node if node.op == "call_function" else _first_user(program, node)


def _after(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the node before which to insert what follows `node`, and its neighbour."""
    if node.op == "call_function":
        return node.next, node
    first = _first_user(program, node)
    return first, first


def _first_user(program: Program, node: fx.Node) -> fx.Node:
    users = set(node.users)
    found: fx.Node
    for found in program.graph.nodes:
        if found in users and found.op == "call_function":
            return found
    raise ProgramError(f"rewrite: no call uses {program.where(node)}, so it has no region")


def _insert(
    program: Program,
    point: fx.Node,
    like: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wanted: Layout | None = None,
) -> fx.Node:
    """Insert a call before `point` with the metadata of `like`; see `_place` for `wanted`."""
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else target.__name__
    name = name.split("::")[-1].strip("_")
    with program.graph.inserting_before(point):
        node = program.graph.create_node("call_function", target, args, kwargs, name)
    node.meta.update({key: like.meta[key] for key in KEPT if key in like.meta})
    node.meta["val"] = _run_without_data(node, program.plan.axes)
    if "layout" in like.meta:
        _place(program, node, wanted)
    return node


def _inline(
    program: Program,
    graph: fx.Graph,
    inputs: dict[str, Any],
    point: fx.Node,
    like: fx.Node,
    wanted: Layout | None = None,
) -> fx.Node:
    """Insert the calls of a traced function before `point` and return its result."""
    result: fx.Node = graph.output_node().args[0][0]  # type: ignore[index, assignment]
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = inputs[str(node.target)]
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            last = wanted if node is result else None
            values[node] = _insert(program, point, like, node.target, args, kwargs, last)
    return values[result]


def _take_over(program: Program, old: fx.Node, new: fx.Node) -> fx.Node:
    """Give `new` the users of `old`, which is erased."""
    _refuse_other_type(program, old, new)
    take_name(new, old)
    old.replace_all_uses_with(new)
    program.graph.erase_node(old)
    return new


def _refuse_other_type(program: Program, old: fx.Node, new: fx.Node) -> None:
    for what, before, after in (
        ("shape", *(shapes_of(node)[0] for node in (old, new))),
        ("dtype", *(tensors_of(node.meta["val"])[0].dtype for node in (old, new))),
        ("placement", *(layout_of(node).text(program.axis_names()) for node in (old, new))),
    ):
        if before != after:
            raise ProgramError(
                f"rewrite: expected {what} {before}, as {program.where(old)} has, got {after} from "
                f"{new.target}; whoever uses the value relies on it"
            )


def _place(program: Program, node: fx.Node, wanted: Layout | None) -> None:
    """Set the placement that follows from the inputs of `node` by its rule; `wanted` if it can."""
    layout = INVARIANT
    for axis in reversed(solved_axes(program)):  # shapes are local to the axes before
        on_axis = None if wanted is None else wanted.on(axis.name)
        placement = _placement(program, node, axis, layout, on_axis)
        layout = layout.with_placement(axis.name, placement)
    node.meta["layout"] = layout


def _placement(
    program: Program, node: fx.Node, axis: MeshAxis, layout: Layout, wanted: Placement | None
) -> Placement:
    if node.target in (redistribute, route) and node.kwargs["axis"] == axis.name:
        return Placement.parse(str(node.kwargs["dst"]))
    inputs = tuple(map(axis.placement, tensor_inputs(node)))
    if set(inputs) <= {I} or set(inputs) == {R}:  # every rank computes the same
        return R if inputs and inputs[0] == R else I
    shards = {placement for placement in inputs if placement.cuts}
    dims = {Placement("S", dim) for dim in range(len(shapes_of(node)[0]))}
    legal = []
    for output in plain_placements((), axis.size) | shards | dims | ({wanted} if wanted else set()):
        # a call's global shape depends on it
        node.meta["layout"] = layout.with_placement(axis.name, output)
        if Strategy(inputs, output) in strategies(global_call(node, axis), {output}):
            legal.append(output)
    if wanted in legal:
        legal = [wanted]
    if len(legal) != 1:
        raise ProgramError(
            f"rewrite: the placement of {node.target} at {program.where(node)} does not follow "
            f"from its inputs {inputs}: its rule allows {sorted(map(str, legal)) or 'none'}. "
            "Register a rule (ilm_compile.sharding.rule), insert a redistribute, or let the pass "
            'run before sharding (before = frozenset({"sharded"}))'
        )
    return legal[0]


def _run_without_data(node: fx.Node, sizes: Sizes) -> Any:
    """Return the value of a call as tensors without data, from the values of its inputs."""
    with shape_communicators(sizes), torch.no_grad():
        value = run_without_data(node)
    several = isinstance(value, tuple) and getattr(node.target, "namespace", "") != "aten"
    if (several and len(tensors_of(value)) == len(value)) or isinstance(value, Tensor):
        return without_data(value)
    raise ProgramError(
        f"rewrite: expected a call that returns one tensor, got {type(value).__name__}"
    )

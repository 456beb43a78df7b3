"""Faults of compiled programs: every way in which passes have been seen to go wrong, as edits.

Each kind yields the places where it applies to a given program. An edit changes a copy of that
program and keeps its books (placements, shapes, regions) in order, as a wrong pass would.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, fx

from ilm_compile.passes.rewrite import insert_before, wrap
from ilm_compile.program.collectives import TRANSITIONS, redistribute
from ilm_compile.program.copy import copy_program
from ilm_compile.program.placement import Placement, S
from ilm_compile.program.program import Program
from ilm_compile.program.values import shapes_of
from ilm_compile.sharding.strategy import global_shape, placement_of

Edit = Callable[[Program, fx.Node], None]
Place = tuple[fx.Node, str, Edit]  # where, more words about it, and what to do there
Kind = Callable[[Program], Iterator[Place]]
aten, ilm = torch.ops.aten, torch.ops.ilm
CAST = aten.to.dtype
FACTORS = (2.0, 1 + 1e-6)  # a doubled gradient, and one that no loss curve would show


def mutated(program: Program, node: fx.Node, edit: Edit) -> Program:
    """Return a copy of `program` on which `edit` was done at the copy of `node`."""
    position = list(program.graph.nodes).index(node)
    result = copy_program(program)
    edit(result, list(result.graph.nodes)[position])
    result.finish()
    return result


def _collectives(program: Program) -> list[fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=redistribute))


def _parameters(program: Program) -> list[fx.Node]:
    nodes = program.graph.find_nodes(op="get_attr")
    return [n for n in nodes if program.variables[str(n.target)].is_parameter and n.users]


def _users(node: fx.Node) -> list[fx.Node]:
    """The users of `node` in graph order, which a copy of the graph keeps."""
    return [user for user in node.graph.nodes if user in node.users]


def _ends(node: fx.Node) -> tuple[Placement, Placement]:
    return Placement.parse(str(node.kwargs["src"])), Placement.parse(str(node.kwargs["dst"]))


def _type(node: fx.Node) -> str:
    return " -> ".join(map(str, _ends(node)))


def drop_collective(program: Program) -> Iterator[Place]:
    """The value goes on as it was before the collective."""

    def edit(program: Program, node: fx.Node) -> None:
        node.replace_all_uses_with(node.all_input_nodes[0])

    for node in _collectives(program):
        yield node, _type(node), edit


def double_collective(program: Program) -> Iterator[Place]:
    """The same collective twice in a row."""

    def edit(program: Program, node: fx.Node) -> None:
        with program.graph.inserting_after(node):
            twice = program.graph.node_copy(node)
        node.replace_all_uses_with(twice)
        twice.args = (node,)

    for node in _collectives(program):
        if not any(end.is_shard for end in _ends(node)):  # else the shapes do not fit
            yield node, _type(node), edit


def retype_collective(program: Program) -> Iterator[Place]:
    """A collective to or from another type of the same shape: the wrong backward."""

    def edit(src: Placement, dst: Placement, program: Program, node: fx.Node) -> None:
        node.kwargs = {**node.kwargs, "src": str(src), "dst": str(dst)}
        node.meta["placement"] = dst

    for node in _collectives(program):
        ends = _ends(node)
        whole = [Placement(kind) for kind in "IRP"]
        for side in (0, 1):
            for other in whole if not ends[side].is_shard else []:
                src, dst = (other, ends[1]) if side == 0 else (ends[0], other)
                if (src, dst) != ends and (src.kind, dst.kind) in TRANSITIONS:
                    yield node, f"{_type(node)} as {src} -> {dst}", partial(edit, src, dst)


def flip_shard_dim(program: Program) -> Iterator[Place]:
    """A parameter, or the result of a collective, sharded along another dimension."""

    def edit(placement: Placement, program: Program, node: fx.Node) -> None:
        shape = global_shape(node, program.plan.tp)
        local = placement.local_shape(shape, program.plan.tp)
        node.meta.update(val=node.meta["val"].new_empty(local), placement=placement)
        if node.op == "get_attr":
            program.variables[str(node.target)].placement = placement
        else:
            node.kwargs = {**node.kwargs, "dst": str(placement)}

    for node in [*_parameters(program), *_collectives(program)]:
        placement, shape = placement_of(node), global_shape(node, program.plan.tp)
        for dim in range(len(shape)) if placement.is_shard else ():
            if dim != placement.dim and S(dim).divides(shape, program.plan.tp):
                yield node, f"{placement} as {S(dim)}", partial(edit, S(dim))


def swap_segments(program: Program) -> Iterator[Place]:
    """The parts of a fused parameter forgotten, merged, or in another order."""

    def edit(segments: tuple[int, ...], at_rest: bool, program: Program, node: fx.Node) -> None:
        placement = S(placement_of(node).dim, segments)
        program.variables[str(node.target)].placement = placement
        if not at_rest:
            node.meta["placement"] = placement

    for node in _parameters(program):
        first, *rest = placement_of(node).segments or (0,)
        if not rest:
            continue
        wrong = [(), (first + rest[0], *rest[1:]), (first, sum(rest)), (*rest, first)]
        for segments in wrong:
            if S(0, segments).segments == placement_of(node).segments:
                continue
            for at_rest in (True, False):
                words = f"segments {list(segments)}{' in memory only' if at_rest else ''}"
                yield node, words, partial(edit, segments, at_rest)


def scale_gradient(program: Program) -> Iterator[Place]:
    """The value stays, its gradient is multiplied."""

    def edit(factor: float, program: Program, node: fx.Node) -> None:
        def scaled(x: Tensor) -> Tensor:
            return x * factor - x.detach() * (factor - 1)

        wrap(program, node, scaled)

    for node in _parameters(program):
        for factor in FACTORS:
            yield node, f"of {node.target} by {factor:g}", partial(edit, factor)


def forget_gradient(program: Program) -> Iterator[Place]:
    """One use of a parameter adds nothing to its gradient: tied weights, used twice, first."""

    def edit(position: int, program: Program, node: fx.Node) -> None:
        user = _users(node)[position]
        user.replace_input_with(node, insert_before(program, user, aten.detach.default, node))

    for node in sorted(_parameters(program), key=lambda node: -len(node.users)):
        for position, user in enumerate(_users(node)):
            words = f"of {'tied ' if len(node.users) > 1 else ''}{node.target} in {user.name}"
            yield node, words, partial(edit, position)


def swap_parameters(program: Program) -> Iterator[Place]:
    """Two parameters of the same shape and placement, each in the place of the other."""

    def edit(other: str, program: Program, node: fx.Node) -> None:
        first, second = node, next(n for n in _parameters(program) if n.target == other)
        users = set(first.users)
        second.replace_all_uses_with(first, delete_user_cb=lambda user: user not in users)
        first.replace_all_uses_with(second, delete_user_cb=users.__contains__)

    for first, second in combinations(_parameters(program), 2):
        variables = [program.variables[str(n.target)] for n in (first, second)]
        alike = {(v.shape, v.placement) for v in variables}
        apart = set(first.users).isdisjoint(second.users)
        if len(alike) == 1 and apart:
            yield first, f"{first.target} and {second.target}", partial(edit, str(second.target))


def skip_cast(program: Program) -> Iterator[Place]:
    """A value goes on in the dtype it had before the cast."""

    def edit(program: Program, node: fx.Node) -> None:
        node.replace_all_uses_with(node.all_input_nodes[0])

    for node in program.graph.find_nodes(op="call_function", target=CAST):
        source, value = node.all_input_nodes[0].meta["val"], node.meta["val"]
        if source.dtype != value.dtype:
            yield node, f"{source.dtype} to {value.dtype}", edit


def round_partial_sum(program: Program) -> Iterator[Place]:
    """Parts rounded to bf16 before they are summed, where their sum should be rounded once."""

    def edit(program: Program, node: fx.Node) -> None:
        (part,) = node.all_input_nodes
        value = part
        for dtype in (torch.bfloat16, part.meta["val"].dtype):
            with program.graph.inserting_before(node):
                value = program.graph.call_function(CAST, (value, dtype))
            value.meta = {**part.meta, "val": part.meta["val"].to(dtype)}
        node.args = (value,)

    for node in _collectives(program):
        (part,) = node.all_input_nodes
        if placement_of(part).kind == "P" and part.meta["val"].dtype != torch.bfloat16:
            yield node, f"{part.name}, {_type(node)}", edit


def move_node(program: Program) -> Iterator[Place]:
    """A node in the stage before or after its own."""

    def edit(stage: int, program: Program, node: fx.Node) -> None:
        node.meta["stage"] = stage

    last = max((node.meta.get("stage", 0) for node in program.calls()), default=0)
    for node in program.calls():
        for step in (-1, +1):
            stage = node.meta.get("stage", -2) + step
            if last and 0 <= stage <= last:
                yield node, f"from stage {stage - step} to {stage}", partial(edit, stage)


def drop_stage(program: Program) -> Iterator[Place]:
    """A node in no stage."""

    def edit(program: Program, node: fx.Node) -> None:
        del node.meta["stage"]

    if len({node.meta.get("stage") for node in program.calls()} - {None}) > 1:
        for node in program.calls():
            if "stage" in node.meta:
                yield node, "", edit


def drop_recompute(program: Program) -> Iterator[Place]:
    """A block keeps its activations."""

    def edit(program: Program, node: fx.Node) -> None:
        index = node.meta["region"]
        program.regions[index] = replace(program.regions[index], recompute=False)

    first = {node.meta["region"]: node for node in reversed(list(program.calls()))}
    for index, node in sorted(first.items()):
        if program.regions[index].recompute:
            yield node, f"of {program.regions[index].name}", edit


def drop_residual(program: Program) -> Iterator[Place]:
    """A residual connection lost: a sum gives one of its operands only."""

    def edit(program: Program, node: fx.Node) -> None:
        node.replace_all_uses_with(node.all_input_nodes[1])

    for node in program.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        operands = node.all_input_nodes
        if len(operands) == 2 and len({o.meta["val"].shape for o in operands}) == 1:
            yield node, "", edit


def drop_fused_residual(program: Program) -> Iterator[Place]:
    """A residual connection lost in a fused op: it is given zeros in the place of one term."""

    def edit(position: int, program: Program, node: fx.Node) -> None:
        term = node.args[position]
        zeros = insert_before(program, node, aten.zeros_like.default, term)
        zeros.meta["placement"] = placement_of(term)  # type: ignore[arg-type]
        node.update_arg(position, zeros)

    for node in program.graph.find_nodes(op="call_function", target=ilm.add_rms_norm.default):
        for position, words in enumerate(("the layer's", "the stream's")):
            yield node, f"{words} term", partial(edit, position)


def take_other_result(program: Program) -> Iterator[Place]:
    """Of an op with several results of one shape, another one."""

    def edit(index: int, program: Program, node: fx.Node) -> None:
        node.update_arg(1, index)

    for node in program.graph.find_nodes(op="call_function", target=operator.getitem):
        shapes = shapes_of(node.all_input_nodes[0])
        for index, shape in enumerate(shapes):
            if index != node.args[1] and shape == shapes_of(node)[0]:
                yield node, f"{index} in the place of {node.args[1]}", partial(edit, index)


KINDS: dict[str, Kind] = {
    "drop a collective": drop_collective,
    "double a collective": double_collective,
    "retype a collective": retype_collective,
    "flip a shard dim": flip_shard_dim,
    "swap segments": swap_segments,
    "scale a gradient": scale_gradient,
    "forget a gradient (tied)": forget_gradient,
    "swap two parameters": swap_parameters,
    "drop a residual": drop_residual,
    "drop a fused residual": drop_fused_residual,
    "take another result": take_other_result,
    "skip a cast": skip_cast,
    "round a partial sum": round_partial_sum,
    "move a node to another stage": move_node,
    "leave a node in no stage": drop_stage,
    "drop a recompute boundary": drop_recompute,
}

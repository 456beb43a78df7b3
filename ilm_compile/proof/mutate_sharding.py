"""Faults of sharding and of the cut into stages: collectives, placements, segments, regions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import fx

from ilm_compile.program.collectives import TRANSITIONS
from ilm_compile.program.layout import WEIGHT_AXES, layout_of
from ilm_compile.program.placement import Placement, S
from ilm_compile.program.program import Program
from ilm_compile.proof.mutate_places import (
    CAST,
    Kind,
    Place,
    collectives,
    leave_out,
    parameters,
)

FUSED = WEIGHT_AXES[0]  # the axis that cuts fused parameters


def _ends(node: fx.Node) -> tuple[Placement, Placement]:
    return Placement.parse(str(node.kwargs["src"])), Placement.parse(str(node.kwargs["dst"]))


def _type(node: fx.Node) -> str:
    return " -> ".join(map(str, _ends(node)))


def drop_collective(program: Program) -> Iterator[Place]:
    """The value goes on as it was before the collective."""
    for node in collectives(program):
        yield node, _type(node), leave_out


def double_collective(program: Program) -> Iterator[Place]:
    """The same collective twice in a row."""

    def edit(program: Program, node: fx.Node) -> None:
        with program.graph.inserting_after(node):
            twice = program.graph.node_copy(node)
        node.replace_all_uses_with(twice)
        twice.args = (node,)

    for node in collectives(program):
        if not any(end.is_shard for end in _ends(node)):  # else the shapes do not fit
            yield node, _type(node), edit


def retype_collective(program: Program) -> Iterator[Place]:
    """A collective to or from another type of the same shape: the wrong backward."""

    def edit(src: Placement, dst: Placement, program: Program, node: fx.Node) -> None:
        node.kwargs = {**node.kwargs, "src": str(src), "dst": str(dst)}
        _place(node, str(node.kwargs["axis"]), dst)

    for node in collectives(program):
        ends = _ends(node)
        whole = [Placement(kind) for kind in "IRP"]
        for side in (0, 1):
            for other in whole if not ends[side].is_shard else []:
                src, dst = (other, ends[1]) if side == 0 else (ends[0], other)
                if (src, dst) != ends and (src.kind, dst.kind) in TRANSITIONS:
                    yield node, f"{_type(node)} as {src} -> {dst}", partial(edit, src, dst)


def flip_shard_dim(program: Program) -> Iterator[Place]:
    """A parameter, or the result of a collective, sharded along another dimension."""

    def edit(name: str, placement: Placement, program: Program, node: fx.Node) -> None:
        axis = program.plan.axis(name)
        own = node.meta["val"].shape
        shape = axis.placement(node).global_shape(own, axis.size)
        local = placement.local_shape(shape, axis.size)
        node.meta["val"] = node.meta["val"].new_empty(local)
        _place(node, name, placement)
        if node.op == "get_attr":
            program.variables[str(node.target)].layout = layout_of(node)
        else:
            node.kwargs = {**node.kwargs, "dst": str(placement)}

    for axis in program.plan.mesh_axes:
        moved = [node for node in collectives(program) if node.kwargs["axis"] == axis.name]
        for node in [*parameters(program), *moved]:
            placement, shape = axis.placement(node), axis.shape(node)
            for dim in range(len(shape)) if placement.is_shard else ():
                if dim != placement.dim and S(dim).divides(shape, axis.size):
                    yield node, f"{placement} as {S(dim)}", partial(edit, axis.name, S(dim))


def _place(node: fx.Node, axis: str, placement: Placement) -> None:
    node.meta["layout"] = layout_of(node).with_placement(axis, placement)


def swap_segments(program: Program) -> Iterator[Place]:
    """The parts of a fused parameter forgotten, merged, or in another order."""

    def edit(segments: tuple[int, ...], at_rest: bool, program: Program, node: fx.Node) -> None:
        layout = layout_of(node)
        layout = layout.with_placement(FUSED, S(layout.on(FUSED).dim, segments))
        program.variables[str(node.target)].layout = layout
        if not at_rest:
            node.meta["layout"] = layout

    for node in parameters(program):
        first, *rest = layout_of(node).on(FUSED).segments or (0,)
        if not rest:
            continue
        wrong = [(), (first + rest[0], *rest[1:]), (first, sum(rest)), (*rest, first)]
        for segments in wrong:
            if S(0, segments).segments == layout_of(node).on(FUSED).segments:
                continue
            for at_rest in (True, False):
                words = f"segments {list(segments)}{' in memory only' if at_rest else ''}"
                yield node, words, partial(edit, segments, at_rest)


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

    for node in collectives(program):
        (part,) = node.all_input_nodes
        if layout_of(part).is_partial and part.meta["val"].dtype != torch.bfloat16:
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


KINDS: dict[str, Kind] = {
    "drop a collective": drop_collective,
    "double a collective": double_collective,
    "retype a collective": retype_collective,
    "flip a shard dim": flip_shard_dim,
    "swap segments": swap_segments,
    "round a partial sum": round_partial_sum,
    "move a node to another stage": move_node,
    "leave a node in no stage": drop_stage,
    "drop a recompute boundary": drop_recompute,
}

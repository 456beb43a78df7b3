"""Fewer blocks for a step that is too long: a block is taken out of both graphs if its stage keeps
another of its kind, recomputed like it. What remains has every distinct block, every cut between
stages, and the schedule as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from ilm_compile.program.copy import copy_program
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program
from ilm_compile.proof.pieces import Anchor, Piece


def without_repeats(
    traced: Program, program: Program, pieces: Sequence[Piece], signatures: Sequence[str]
) -> tuple[Program, Program]:
    """Return copies of both graphs without repeated blocks."""
    kept: set[tuple[str, int, bool]] = set()  # kinds of blocks that a stage has
    old: dict[str, str] = {}  # of outputs that are gone, what stands for them
    new: dict[str, str] = {}
    for before, piece, kind in zip(pieces, pieces[1:], signatures[1:], strict=False):
        recompute = {program.regions[a.node.meta["region"]].recompute for a in piece.outputs}
        found = _stages(piece)
        kinds = {(kind, stage, each) for stage in found for each in recompute}
        if len(kinds) != 1 or not kinds <= kept or not _follows(program, piece, before):
            kept |= kinds
            continue
        for gone, stays in zip(piece.outputs, before.outputs, strict=True):
            old[gone.origin.name] = old.get(stays.origin.name, stays.origin.name)
            new[gone.node.name] = new.get(stays.node.name, stays.node.name)
    return _replaced(traced, old), _replaced(program, new)


def _stages(piece: Piece) -> set[int]:
    """The stages of what is the piece's own; clones are in none."""
    calls = [node for node in piece.compiled.calls if node.op == "call_function"]
    return {n.meta.get("stage", 0) for n in calls if not n.meta.get("clone")}


def _follows(program: Program, piece: Piece, before: Piece) -> bool:
    """Whether what `piece` gives can be had from the piece before it."""
    regions = {program.regions[a.node.meta["region"]] for a in (*piece.outputs, *before.outputs)}
    return (
        len(piece.outputs) == len(before.outputs)
        and all(region.is_block for region in regions)
        and all(_type(a) == _type(b) for a, b in zip(piece.outputs, before.outputs, strict=True))
    )


def _type(anchor: Anchor) -> tuple[object, ...]:
    value = anchor.node.meta["val"]
    return value.shape, value.dtype, layout_of(anchor.node), anchor.trained


def _replaced(program: Program, names: Mapping[str, str]) -> Program:
    result = copy_program(program)
    nodes: dict[str, fx.Node] = {node.name: node for node in result.graph.nodes}
    for gone, kept in names.items():
        nodes[gone].replace_all_uses_with(nodes[kept])
    result.finish()
    used = {str(n.target) for n in result.graph.find_nodes(op="get_attr") if n.users}
    result.parameter_maps = [m for m in result.parameter_maps if used & set(m.targets)]
    sources = {name for each in result.parameter_maps for name in each.names()}
    for node in result.graph.find_nodes(op="get_attr"):
        if not node.users:
            result.graph.erase_node(node)
    result.variables = {
        name: v for name, v in result.variables.items() if name in used or name in sources
    }
    result.finish()
    return result

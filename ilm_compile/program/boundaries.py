"""Where the stages of a split program meet: which values one stage passes to the next.

A value made in one stage and used in a later one passes through every stage in between, so that
each stage talks to its neighbours only, and its gradient comes back the same way by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from torch import fx

from ilm_compile.errors import ProgramError
from ilm_compile.program.gradients import wanted_gradients
from ilm_compile.program.lowered import Boundary
from ilm_compile.program.program import Program
from ilm_compile.program.values import is_tuple


def stage_parts(program: Program) -> Iterator[tuple[int, int, list[fx.Node]]]:
    """Yield the stage, the region and the calls of each run of calls that share them, in order.

    Raises `ProgramError` as `stage_of` does.
    """
    placed = stage_of(program)
    for (stage, region), group in groupby(placed, lambda n: (placed[n], n.meta["region"])):
        yield stage, region, list(group)


def stage_of(program: Program) -> dict[fx.Node, int]:
    """Return the stage of every call that is not a clone, in graph order.

    A program that was never split is one stage. Raises `ProgramError` if a node lies in no stage,
    or in an earlier one than what it uses.
    """
    is_split = any("stage" in node.meta for node in program.calls())
    placed: dict[fx.Node, int] = {}
    for node in program.calls():
        if node.meta.get("clone"):
            continue
        if is_split and "stage" not in node.meta:
            raise ProgramError(f"lower: {program.where(node)} is in no stage and is no clone")
        placed[node] = node.meta.get("stage", 0)
    for node, stage in placed.items():
        for source in node.all_input_nodes:
            if placed.get(source, 0) > stage:
                raise ProgramError(
                    f"lower: {program.where(node)} is in stage {stage}, before its input "
                    f"{source.name} in stage {placed[source]}; stages must follow the graph's order"
                )
    return placed


def stage_boundaries(program: Program) -> list[dict[fx.Node, Boundary]]:
    """Return, for each stage, what it receives: values made before it, used in it or later.

    The last stage uses the program's outputs. Raises `ProgramError` for a value that cannot be
    sent, and as `stage_of` does.
    """
    placed = stage_of(program)
    last = max(placed.values(), default=0)
    wanted = wanted_gradients(program.graph)
    return [
        {
            node: _boundary(program, node, stage, placed, wanted)
            for node, made in placed.items()
            if made < stage and any(placed.get(user, last) >= stage for user in node.users)
        }
        for stage in range(last + 1)
    ]


def _boundary(
    program: Program, node: fx.Node, stage: int, placed: dict[fx.Node, int], wanted: set[fx.Node]
) -> Boundary:
    """Describe `node` on its way into `stage`. A value that is only an output has no gradient."""
    val = node.meta["val"]
    if is_tuple(node):
        raise ProgramError(
            f"lower: {program.where(node)} has several results and would be sent to stage {stage}; "
            "its items are to be made in its own stage"
        )
    if not val.is_floating_point():
        raise ProgramError(
            f"lower: {program.where(node)} has dtype {val.dtype} and would be sent to stage "
            f"{stage}; only floating-point values cross stages. Cut elsewhere"
        )
    is_loss = node is program.outputs[0]
    later = any(user in wanted and placed.get(user, -1) >= stage for user in node.users)
    return Boundary(node.name, tuple(val.shape), val.dtype, node in wanted and (later or is_loss))

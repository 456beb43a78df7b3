"""Cuts of a program where another one of the same model, on another batch shape, is cut."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from torch import fx

from ilm_compile.errors import PlanError
from ilm_compile.program.program import Program
from ilm_compile.rewrite.cut_points import crossing_bytes


def cuts_like(first: Program, calls: Sequence[fx.Node], num_stages: int) -> list[int]:
    """Return the positions in `calls` where stages begin, so that each has what it has in `first`.

    At the node of the same name where that is such a place, else where the fewest bytes cross.
    Raises `PlanError` if there is none.
    """
    stages = stages_by_variable(first)
    begins = _first_nodes(first)
    crossing = crossing_bytes(calls)
    cuts: list[int] = []
    for stage in range(1, num_stages):
        low, high = max([0, *cuts]) + 1, len(calls) - 1
        for position, node in enumerate(calls):
            owners = {s for n in node.all_input_nodes for s in stages.get(str(n.target), ())}
            if len(owners) != 1:
                continue  # none, or one that is tied
            (owner,) = owners
            if owner < stage:
                low = max(low, position + 1)
            else:
                high = min(high, position)
        places = [p for p in range(low, high + 1) if crossing[p] < inf]
        if not places:
            raise PlanError(
                f"shapes: found no place to begin stage {stage} where the program of the first "
                "shape does; the model takes another way for this shape: compile a program of its "
                "own"
            )
        named = [p for p in places if calls[p].name == begins[stage]]
        cuts.append(named[0] if named else min(places, key=crossing.__getitem__))
    return cuts


def stages_by_variable(program: Program) -> dict[str, set[int]]:
    """Return the stages that use each variable which the graph has, by its name."""
    found: dict[str, set[int]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        users = {user.meta["stage"] for user in node.users if "stage" in user.meta}
        found.setdefault(str(node.target), set()).update(users)
    return found


def _first_nodes(program: Program) -> dict[int, str]:
    names: dict[int, str] = {}
    for node in program.calls():
        if "stage" in node.meta:
            names.setdefault(node.meta["stage"], node.name)
    return names

"""The boundaries of packed documents, made once for all layers.

An attention makes of `cu_seqlens` what its kernel reads: some small kernels, or where the host
reads it a wait for the device, in every layer, forward, backward and recompute. As a call of its
own, which no parameter reaches, it is run once for a micro-batch on each stage, like rotary tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ilm_compile.ops.attention import ATTENTION, BOUNDARIES, QUERY_ATTENTION, QUERY_BOUNDARIES
from ilm_compile.passes.base import Pass
from ilm_compile.program.arguments import argument
from ilm_compile.program.layout import AXES, layout_of, sharded_over
from ilm_compile.program.placement import S
from ilm_compile.program.program import Program
from ilm_compile.rewrite.edit import insert_before

_INDEX, _NAME = 3, "cu_seqlens"  # of both ops


def boundary_passes(program: Program) -> list[Pass]:
    """Return the pass that a program with packed documents needs beside the standard ones."""
    return [ShareBoundaries()] if any(map(_documents, program.calls())) else []


def _documents(node: fx.Node) -> fx.Node | None:
    """Return the `cu_seqlens` of an attention that has some."""
    if node.target not in (ATTENTION, QUERY_ATTENTION):
        return None
    found = argument(node, _NAME)
    return found if isinstance(found, fx.Node) and found.meta["val"].dim() < 4 else None


@dataclass(frozen=True, kw_only=True)
class ShareBoundaries(Pass):
    """Give all attentions with the same `cu_seqlens` the boundaries that one call makes of it.

    Those whose queries are sharded by position share what is of this rank's queries; where keys
    travel, they are on the host, which reads them. Attention over rows that the ranks of an axis
    divide is left alone: its rank's boundaries are no part of the whole batch's. Preserves
    numerics bit for bit.
    """

    name: ClassVar[str] = "share-boundaries"
    after: ClassVar[frozenset[str]] = frozenset({"sharded", "cast", *map(sharded_over, AXES)})
    before: ClassVar[frozenset[str]] = frozenset({"split"})

    def apply(self, program: Program) -> None:
        made: dict[Any, fx.Node] = {}
        users, left = 0, 0
        for node in list(program.calls()):
            given = _documents(node)
            if given is None:
                continue
            if any(place.cuts for _, place in layout_of(given).placed):
                left += 1
                continue
            target, *rest = _call(program, node)
            key = given, target, *map(str, rest)
            if key not in made:
                made[key] = insert_before(program, node, target, given, *rest)
                if target is QUERY_BOUNDARIES:
                    layout = layout_of(made[key]).with_placement(str(rest[-1]), S(0))
                    made[key].meta["layout"] = layout
            if len(node.args) > _INDEX:
                node.update_arg(_INDEX, made[key])
            else:
                node.update_kwarg(_NAME, made[key])
            users += 1
        program.decisions.append(
            f"{self.name}: {users} attentions read the boundaries of documents that "
            f"{len(made)} {'call makes' if len(made) == 1 else 'calls make'} once a micro-batch"
        )
        if left:
            program.decisions.append(
                f"{self.name}: {left} attentions left alone: the ranks of an axis divide their rows"
            )


def _call(program: Program, node: fx.Node) -> tuple[Any, ...]:
    """Return what makes the boundaries for `node`: the op and its arguments after cu_seqlens."""
    keys: Any = node.args[1]
    batch, num_tokens = keys.meta["val"].shape[:2]
    if node.target is ATTENTION:
        return BOUNDARIES, batch, num_tokens, argument(node, "tokens")
    placement, parts, axis = node.args[-3:]
    if parts == 1:
        return QUERY_BOUNDARIES, batch, num_tokens, placement, axis
    return BOUNDARIES, batch, num_tokens * int(str(parts)), None, True

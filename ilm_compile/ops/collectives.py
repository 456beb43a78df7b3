"""The typed collective, as other axes than its own see it: it moves pieces of a value."""

from __future__ import annotations

from collections.abc import Iterator

from ilm_compile.ops.call import Call, Strategy, axis_of
from ilm_compile.ops.precision import MOVE
from ilm_compile.ops.spec import OpSpec, define
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.layout import AXES
from ilm_compile.program.placement import P, Placement, S


def moved(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """A collective over another axis: each of its pieces is cut as the whole is.

    Over an axis that cuts later nothing has moved, as seen from here. Over one that cuts before,
    the dimension that is gathered consists of as many parts as it has ranks, each cut on its own:
    a placement in segments.
    """
    yield Strategy((P,), P)
    name = axis_of(call)
    source, target = (Placement.parse(str(call.kwargs[key])) for key in ("src", "dst"))
    is_later = AXES.index(name) > AXES.index(call.axis.name)
    (shape,) = call.shapes
    for out in wanted:
        is_apart = not any(p.cuts and p.dim == 0 for p in (source, target))
        if out.kind in "TDEC" and is_apart:
            yield Strategy((out,), out)
        if not out.is_shard:
            continue
        touched = [p for p in (source, target) if p.is_shard and p.dim == out.dim and not is_later]
        if not touched:
            yield Strategy((out,), out)
        elif len(touched) == 1 and touched[0] == S(out.dim):
            yield from _through(out, shape[out.dim], call.shape[out.dim])


def _through(out: Placement, before: int, after: int) -> Iterator[Strategy]:
    """Yield how a dimension lies before a collective that changes its size, if it can be `out`."""
    own = out.segments or (after,)
    if before > after:  # it is cut, so it was as many parts, each of which lay as it does now
        yield Strategy((S(out.dim, own * (before // after), folded=out.folded),), out)
        return
    parts = after // before
    part = own[: len(own) // parts]
    if part and own == part * parts:
        yield Strategy((S(out.dim, part, folded=out.folded),), out)


define(OpSpec(other_axis=moved, precision=MOVE, carries=True), redistribute)

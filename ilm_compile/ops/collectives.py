"""Rules of what talks over one axis, as the other axes see it.

A sharded form (a cross entropy whose vocabulary is cut) follows on any other axis the rule of the
op that it stands for, as far as that needs no form of its own: rows may be cut once more, the
vocabulary may not. A typed collective moves pieces of a value that other axes may cut as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ilm_compile.ops.attention import ATTENTION, QUERY_ATTENTION, QUERY_SDPA, SDPA
from ilm_compile.ops.localize import localize
from ilm_compile.ops.losses import linear_cross_entropy_by_tokens
from ilm_compile.ops.reductions import REDUCED, SOFTMAXES
from ilm_compile.ops.strategy import OTHER_AXIS, Call, Strategy, aten, axis_of, rule_of
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.layout import AXES
from ilm_compile.program.linear_loss import linear_cross_entropy
from ilm_compile.program.placement import P, Placement, S
from ilm_compile.program.reductions import partial_mean
from ilm_compile.program.sharded_reductions import partial_loss, sharded_gather, sharded_nll_loss
from ilm_compile.program.vocab import vocab_cross_entropy, vocab_embedding

Spelling = Callable[[tuple[Any, ...]], tuple[Any, tuple[Any, ...]]]


def _plain(op: Any) -> Spelling:
    return lambda args: (op, args[:-1])


# From a form's arguments to the op on whole values and its arguments.
STANDS_FOR: dict[Any, Spelling] = {
    vocab_embedding: _plain(aten.embedding.default),
    vocab_cross_entropy: lambda args: (
        aten.cross_entropy_loss.default,
        (*args[:2], None, *args[2:5]),
    ),
    sharded_gather: _plain(aten.gather.default),
    sharded_nll_loss: lambda args: (aten.nll_loss_nd.default, (*args[:2], None, *args[2:4])),
    partial_mean: _plain(aten.mean.dim),
    QUERY_ATTENTION: lambda args: (ATTENTION, args[:5]),
    QUERY_SDPA: lambda args: (SDPA, (*args[:4], 0.0, args[4])),
    partial_loss: lambda args: (getattr(aten, args[0]).default, args[1:3]),
    **{form: _plain(op) for op, form in {**REDUCED, **SOFTMAXES}.items()},
}


def other_axis(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """As the op that the form stands for, without its sharded forms."""
    target, args = STANDS_FOR[call.target](call.args)
    whole = replace(call, target=target, args=args)
    for strategy in rule_of(target)(whole, wanted):
        if localize(whole, strategy, call.axis.name)[0] is target:
            yield strategy


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


OTHER_AXIS.update(dict.fromkeys(STANDS_FOR, other_axis))
OTHER_AXIS[redistribute] = moved
OTHER_AXIS[linear_cross_entropy] = linear_cross_entropy_by_tokens

"""Rules of the batch axis alone: losses, and ops that no other axis needs to shard.

A rule yields (placements of the inputs, placement of the result, weight), the weight being the
power of the number of slices by which the whole batch's value is multiplied (`batch_axis.Known`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch

from ilm_compile.program.loss import MEAN, SUM
from ilm_compile.program.placement import P, Placement, R, S
from ilm_compile.sharding.batch_constants import Values
from ilm_compile.sharding.rules_math import aligned
from ilm_compile.sharding.rules_select import indexed_dims
from ilm_compile.sharding.strategy import Call, aten, tensor_inputs

Found = Iterator[tuple[tuple[Placement, ...], Placement, int]]
BatchRule = Callable[[Call, frozenset[Placement], Values], Found]
CROSS_ENTROPIES = {
    *(aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default),
    aten.nll_loss2d.default,
}
_ELEMENTWISE_LOSSES = (
    *(aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default),
    *(aten.huber_loss.default, aten.binary_cross_entropy.default, aten.kl_div.default),
    *(aten.binary_cross_entropy_with_logits.default, aten.soft_margin_loss.default),
    *(aten.poisson_nll_loss.default, aten.margin_ranking_loss.default),
    aten.hinge_embedding_loss.default,
)
_ALONG = (  # ops that look along one dimension, kept in the result or not
    *(aten.argmax.default, aten.argmin.default, aten.any.dim, aten.all.dim, aten.argsort.default),
    *(aten.argsort.stable, aten.diff.default),
)
CUTS = {aten.slice.Tensor, aten.select.int}  # what leaves rows out
_PADS = (aten.pad.default, aten.constant_pad_nd.default)


def _broadcast(shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _cross_entropy(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Rows of (tokens, classes) or (rows, classes, places...); a mean only over probabilities."""
    logits, target, *weight = call.shapes
    reduction = call.named("reduction")
    is_soft = len(target) == len(logits) and len(logits) > 1
    if reduction == MEAN and not is_soft:
        return
    for dim in (d for d in range(len(logits)) if d != 1):
        kept = S(dim - (dim > 1))
        inputs = (S(dim), S(dim) if is_soft else kept, *(R for _ in weight))
        over_places = dim > 1 and is_soft  # the mean is over the rows of dimension 0 alone
        results = {0: (kept, 0), MEAN: (P, 0 if over_places else -1), SUM: (P, 0)}
        yield inputs, *results[reduction]


def _elementwise_loss(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    shape = _broadcast(call.shapes)
    for dim in range(len(shape)):
        inputs = tuple(aligned(s, shape, S(dim)) for s in call.shapes)
        yield inputs, *{0: (S(dim), 0), MEAN: (P, -1), SUM: (P, 0)}[call.named("reduction")]


def _along(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    shape, over = call.shapes[0], call.named("dim")
    if over is None:
        return
    over %= len(shape)
    kept = len(shape) == len(call.shape)
    for dim in (d for d in range(len(shape)) if d != over):
        yield (S(dim),) * len(call.shapes), S(dim if kept else dim - (dim > over)), 0


def _padded(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """The widths are given for the last dimensions first, two for each."""
    widths, rank = call.args[1], len(call.shape)
    padded = {rank - 1 - i // 2 for i, width in enumerate(widths) if width}
    yield from (((S(dim),), S(dim), 0) for dim in range(rank) if dim not in padded)


def _squeezed(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    kept = [dim for dim, n in enumerate(call.shapes[0]) if n != 1]
    if len(kept) == len(call.shape):
        yield from (((S(dim),), S(index), 0) for index, dim in enumerate(kept))


def _chosen(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """A sum or another one, or 0, by what is the same for all: where there is any target."""
    places = [(P, R) if values.is_zero(n) else (P,) for n in tensor_inputs(call.node)[1:]]
    yield from (((R, *pair), P, 0) for pair in product(*places) if P in pair)


def _one_hot(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    for dim in range(len(call.shapes[0])):
        yield (S(dim),), S(dim), 0


def _pairing(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Cosines and distances of vectors along one dimension, the last if none is named."""
    over = (call.named("dim") if call.named("dim") is not None else -1) % len(call.shapes[0])
    keeps = bool(call.named("keepdim"))
    for dim in (d for d in range(len(call.shapes[0])) if d != over):
        inputs = tuple(aligned(s, call.shapes[0], S(dim)) for s in call.shapes)
        yield inputs, S(dim if keeps else dim - (dim > over)), 0


def _every_nth(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Of every group of neighbouring rows the same one: chosen and rejected answers in turns."""
    (shape,) = call.shapes
    dim, step = call.argument(1, "dim", 0) % len(shape), call.argument(4, "step", 1)
    start, end = call.argument(2, "start") or 0, call.argument(3, "end")
    whole = end is None or end >= shape[dim]
    if 0 <= start < step and whole and shape[dim] % (step * call.size) == 0:
        yield (S(dim),), S(dim), 0


def _indexed(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """``table[x]``, and ``x[arange(rows), position]``: each row picks something of its own."""
    indices: Any = call.args[1]
    positions = [i for i, entry in enumerate(indices) if entry is not None]
    shapes = call.shapes[1:]
    width = _broadcast(shapes)
    if place := indexed_dims(positions, shapes):
        for dim in range(len(width)):
            yield (R, *(aligned(s, width, S(dim)) for s in shapes)), S(place[0] + dim), 0
    counted = values.counts_along(indices[positions[0]])
    if counted is None or positions != list(range(len(positions))):
        return
    rows = S(len(width) - len(shapes[0]) + counted)
    if call.shapes[0][0] == shapes[0][counted]:
        others = (aligned(s, width, rows) for s in shapes[1:])
        yield (S(0), R, *others), rows, 0


def _masked(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """``x[mask] = number``."""
    indices, value = call.args[1:3]
    if (
        len(indices) == 1
        and indices[0].meta["val"].dtype == torch.bool
        and value.meta["val"].dim() == 0
    ):
        yield from (((S(dim), S(dim), R), S(dim), 0) for dim in range(len(call.shapes[1])))


def _unfolded(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    over = call.args[1] % len(call.shapes[0])
    yield from (((S(dim),), S(dim), 0) for dim in range(len(call.shapes[0])) if dim != over)


def _complex(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Real and imaginary parts are the last dimension."""
    for dim in range(min(len(call.shape), len(call.shapes[0]))):
        yield (S(dim),), S(dim), 0


def _summed(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    """Running sums, over classes or experts, of what each slice counted; and other integers."""
    if call.target is not aten.to.dtype or call.named("dtype") != torch.bool:
        yield (P,), P, 0


BATCH_RULES: dict[Any, BatchRule] = {
    **dict.fromkeys(CROSS_ENTROPIES, _cross_entropy),
    **dict.fromkeys(_ELEMENTWISE_LOSSES, _elementwise_loss),
    **dict.fromkeys(_ALONG, _along),
    aten.cosine_similarity.default: _pairing,
    aten.pairwise_distance.default: _pairing,
    **dict.fromkeys(_PADS, _padded),
    aten.one_hot.default: _one_hot,
    aten.where.self: _chosen,
    aten.squeeze.default: _squeezed,
    aten.squeeze.dims: _squeezed,
    aten.slice.Tensor: _every_nth,
    aten.index.Tensor: _indexed,
    aten.index_put.default: _masked,
    aten.unfold.default: _unfolded,
    aten.view_as_complex.default: _complex,
    aten.view_as_real.default: _complex,
    aten.cumsum.default: _summed,
    aten.to.dtype: _summed,
}

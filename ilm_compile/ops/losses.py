"""Losses: cross entropies, whole, by vocabulary and with the head in them; and elementwise ones."""

from __future__ import annotations

from collections.abc import Iterator

from ilm_compile.ops.batch_constants import Values
from ilm_compile.ops.call import Call, Found, LocalCall, Strategy, aten, tensor_inputs, unchanged
from ilm_compile.ops.nodes import rewrites_input
from ilm_compile.ops.pointwise import aligned, broadcast_shape
from ilm_compile.ops.precision import HEAD, LOSS, SOFTMAX
from ilm_compile.ops.spec import OpSpec, Picks, define, rule
from ilm_compile.ops.views import cuts_of
from ilm_compile.program.linear_loss import linear_cross_entropy
from ilm_compile.program.loss import cross_entropy_arguments
from ilm_compile.program.placement import I, P, Placement, R, S
from ilm_compile.program.reductions import MEAN, NONE, SUM
from ilm_compile.program.sharded_reductions import partial_loss, sharded_nll_loss
from ilm_compile.program.vocab import vocab_cross_entropy

CLASSES = Picks(0, 1, 1, "classes")


def of_tokens(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
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


def _of_elements(call: Call, wanted: frozenset[Placement], values: Values) -> Found:
    shape = broadcast_shape(call.shapes)
    for dim in range(len(shape)):
        inputs = tuple(aligned(s, shape, S(dim)) for s in call.shapes)
        yield inputs, *{0: (S(dim), 0), MEAN: (P, -1), SUM: (P, 0)}[call.named("reduction")]


def _cross_entropy(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not strategy.inputs[0].is_shard or strategy.inputs[0].dim != 1:
        return unchanged(call)
    _, reduction, ignore_index, smoothing = cross_entropy_arguments(call.node)
    return vocab_cross_entropy, (*call.args[:2], reduction, ignore_index, smoothing, axis), {}


def _nll_loss(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    if not strategy.inputs[0].is_shard:
        return unchanged(call)
    options = call.argument(3, "reduction", MEAN), call.argument(4, "ignore_index", -100)
    return sharded_nll_loss, (*call.args[:2], *options, axis), {}


def _elementwise_loss(call: Call, strategy: Strategy, axis: str) -> LocalCall:
    is_mean = call.argument(2, "reduction", MEAN) == MEAN
    if not is_mean or not strategy.inputs[0].is_shard:
        return unchanged(call)
    declared = call.target._schema.arguments[3:]
    options = {argument.name: call.named(argument.name) for argument in declared}
    name = call.target._schema.name.removeprefix("aten::")
    return partial_loss, (name, *call.args[:2], axis), options


@rule(
    aten.cross_entropy_loss.default,
    local=_cross_entropy,
    batch_rule=of_tokens,
    precision=SOFTMAX,
    labels=1,
    picks=CLASSES,
)
def cross_entropy(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """By vocabulary (becomes its sharded form); a sum, and no reduction, also by tokens."""
    weight, reduction = call.argument(2, "weight"), call.argument(3, "reduction", MEAN)
    shape, target = call.shapes[:2]
    if weight is not None or len(shape) < 2 or len(target) == len(shape):  # of probabilities
        return
    yield Strategy((S(1), R), I)
    if reduction == NONE:
        for out in wanted:
            if out.is_shard:
                dim = out.dim + (out.dim > 0)
                yield Strategy((out.along(dim), out), out)
    elif reduction == SUM:
        for dim in range(len(target)):
            for cut in cuts_of(tensor_inputs(call.node)[1], call.axis, dim):
                yield Strategy((cut.along(dim + (dim > 0)), cut), P)


@rule(
    vocab_cross_entropy,
    stands_for=lambda args: (aten.cross_entropy_loss.default, (*args[:2], None, *args[2:5])),
    precision=LOSS,
    moves=rewrites_input,
    labels=1,
)
def sharded_cross_entropy(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The vocabulary is sharded by construction; the op reduces over it itself."""
    yield Strategy((S(1), R), I)


def linear_cross_entropy_by_tokens(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """On an axis that does not cut the vocabulary: as `cross_entropy`, tokens are rows of both."""
    if call.args[3] == NONE:
        yield from (Strategy((out, R, out), out) for out in wanted if out.is_shard)
    elif call.args[3] == SUM:
        for cut in cuts_of(tensor_inputs(call.node)[2], call.axis, 0):
            yield Strategy((cut, R, cut), P)


@rule(linear_cross_entropy, other_axis=linear_cross_entropy_by_tokens, precision=HEAD, labels=2)
def sharded_linear_cross_entropy(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The vocabulary is sharded by construction, the rows of the weight."""
    yield Strategy((R, S(0), R), I)


@rule(
    aten.nll_loss_nd.default,
    local=_nll_loss,
    batch_rule=of_tokens,
    precision=SOFTMAX,
    picks=CLASSES,
)
def nll_loss(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """By classes: each rank picks what it holds (`sharded_nll_loss`)."""
    if call.argument(2, "weight") is None and len(call.shapes[0]) > 1:
        yield Strategy((S(1), R), P)


@rule(
    sharded_nll_loss,
    stands_for=lambda args: (aten.nll_loss_nd.default, (*args[:2], None, *args[2:4])),
    precision=SOFTMAX,
    moves=rewrites_input,
)
def nll_loss_by_ranks(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The classes are sharded by construction."""
    yield Strategy((S(1), R), P)


@rule(
    *(aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default),
    *(aten.huber_loss.default, aten.kl_div.default),
    local=_elementwise_loss,
    batch_rule=_of_elements,
    precision=SOFTMAX,
)
def elementwise_loss(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded along any dimension, both inputs alike; a sum and a mean are partial."""
    shape, other = call.shapes
    if shape == other and call.argument(2, "reduction", 1) == NONE:
        yield from (Strategy((out, out), out) for out in wanted if out.is_shard)
    elif shape == other:
        cuts = (S(dim, folded=folded) for dim in range(len(shape)) for folded in (False, True))
        yield from (Strategy((cut, cut), P) for cut in cuts)


@rule(
    partial_loss,
    stands_for=lambda args: (getattr(aten, args[0]).default, args[1:3]),
    precision=SOFTMAX,
    moves=rewrites_input,
)
def loss_by_ranks(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Some dimension is sharded by construction."""
    for dim in range(len(call.shapes[0])):
        yield from (Strategy((cut, cut), P) for cut in (S(dim), S(dim, folded=True)))


define(OpSpec(batch_rule=of_tokens), aten.nll_loss.default, aten.nll_loss2d.default)
define(
    OpSpec(batch_rule=_of_elements),
    *(aten.binary_cross_entropy.default, aten.binary_cross_entropy_with_logits.default),
    *(aten.soft_margin_loss.default, aten.poisson_nll_loss.default),
    *(aten.margin_ranking_loss.default, aten.hinge_embedding_loss.default),
)

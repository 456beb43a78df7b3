"""Rules of embedding, cross entropy and dropout."""

from __future__ import annotations

from collections.abc import Iterator

from ilm_compile.ops.strategy import Call, Strategy, aten, rule, tensor_inputs
from ilm_compile.ops.views import cuts_of
from ilm_compile.program.dropout import seeded_dropout
from ilm_compile.program.linear_loss import linear_cross_entropy
from ilm_compile.program.loss import MEAN, SUM
from ilm_compile.program.placement import I, P, Placement, R, S
from ilm_compile.program.sharded_reductions import NONE
from ilm_compile.program.vocab import vocab_cross_entropy, vocab_embedding


@rule(aten.embedding.default)
def embedding(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """By hidden size, by vocabulary (becomes `vocab_embedding`), or by tokens."""
    yield Strategy((S(1), R), S(len(call.shape) - 1))
    yield Strategy((S(0), R), P)
    for out in wanted:
        if out.is_shard and out.dim < len(call.shape) - 1:
            yield Strategy((R, out), out)


@rule(vocab_embedding)
def sharded_embedding(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The vocabulary is sharded by construction."""
    yield Strategy((S(0), R), P)


@rule(aten.cross_entropy_loss.default)
def cross_entropy(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """By vocabulary (becomes `vocab_cross_entropy`); a sum, and no reduction, also by tokens."""
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


@rule(vocab_cross_entropy)
def sharded_cross_entropy(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The vocabulary is sharded by construction; the op reduces over it itself."""
    yield Strategy((S(1), R), I)


@rule(linear_cross_entropy)
def sharded_linear_cross_entropy(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """The vocabulary is sharded by construction, the rows of the weight."""
    yield Strategy((R, S(0), R), I)


def linear_cross_entropy_by_tokens(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """On an axis that does not cut the vocabulary: as `cross_entropy`, tokens are rows of both."""
    if call.args[3] == NONE:
        yield from (Strategy((out, R, out), out) for out in wanted if out.is_shard)
    elif call.args[3] == SUM:
        for cut in cuts_of(tensor_inputs(call.node)[2], call.axis, 0):
            yield Strategy((cut, R, cut), P)


@rule(aten.nll_loss_nd.default)
def nll_loss(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """By classes: each rank picks what it holds (`sharded_nll_loss`)."""
    if call.argument(2, "weight") is None and len(call.shapes[0]) > 1:
        yield Strategy((S(1), R), P)


@rule(seeded_dropout)
def dropout(call: Call, wanted: frozenset[Placement]) -> Iterator[Strategy]:
    """Sharded as wanted, since the mask is cut like the value; linear for a given mask."""
    for out in wanted:
        if out.is_shard:
            yield Strategy((out, R), out)
    yield Strategy((P, R), P)

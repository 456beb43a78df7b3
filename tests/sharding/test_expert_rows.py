"""Rows of experts, proven as a whole: sorted, multiplied by their experts' matrices and put back.

No op of these is right alone: what one rank calls the first row is another's. So each way that the
rules allow runs on threads, from shards of the tokens to shards of the result, and is held against
the same on one rank, values and gradients.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import PlacementError
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.expert_rows import expert_order, route, sort_rows, unsort_rows
from ilm_compile.program.placement import Placement, S, join_shards, rows_of, split_shards
from ilm_compile.proof.threads import run_ranks

TOKENS, HIDDEN, FFN, EXPERTS, BOUND = 16, 6, 8, 4, 1e-12
AXIS = "ep"
ROUTINGS = {
    "top 2": torch.rand(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0)).argsort(1)[
        :, :2
    ],
    "top 1": torch.arange(TOKENS).remainder(EXPERTS)[:, None],
    "an expert without tokens": torch.arange(TOKENS).remainder(EXPERTS - 1)[:, None],
    "ranks without tokens": torch.full((TOKENS, 1), 0),
    "all to the last": torch.full((TOKENS, 1), EXPERTS - 1),
}
TOKENS_LIE = [S(0), S(0, (8, 8)), S(0, folded=True)]


def product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    bounds = [0, *ends.tolist()]
    groups = zip(bounds, bounds[1:], weights, strict=False)
    return torch.cat([rows[start:end] @ weight for start, end, weight in groups])


def ends_of(sorted_experts: Tensor) -> Tensor:
    return torch.bincount(sorted_experts, minlength=EXPERTS).cumsum(0).to(torch.int32)


def layer(
    x: Tensor, experts: Tensor, up: Tensor, down: Tensor, bias: Tensor, kind: str, lie: Placement
) -> Tensor:
    """A layer of experts, of which a rank runs its part; kind: how its rows lie in the middle."""
    top = experts.shape[1]
    order = expert_order(experts.flatten())
    rows, chosen = sort_rows(x, order, top), sort_rows(experts.flatten(), order, 1)
    ends = here = ends_of(chosen)

    def moved(value: Tensor, source: str, target: str) -> Tensor:
        return route(value, ends, source, target, AXIS)

    source = {"D": str(rows_of("T", lie)), "E": "R"}.get(kind, "")
    if source:
        here = moved(ends, {"D": "C", "E": "R"}[kind], kind)
        rows, chosen = moved(rows, source, kind), moved(chosen, source, kind)
    result = product(F.silu(product(rows, up, here) + bias[chosen]), down, here)
    if source:
        result = moved(result, kind, {"D": source, "E": "P"}[kind])
    return unsort_rows(result, order).unflatten(0, (-1, top)).sum(1)


def inputs() -> list[Tensor]:
    """Tokens, the two matrices of each expert, and a bias of each."""
    generator = torch.Generator().manual_seed(1)
    shapes = (TOKENS, HIDDEN), (EXPERTS, HIDDEN, FFN), (EXPERTS, FFN, HIDDEN), (EXPERTS, FFN)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def whole(experts: Tensor, seed: Tensor) -> tuple[Tensor, list[Tensor]]:
    x, up, down, bias = leaves = [t.requires_grad_() for t in inputs()]
    result = layer(x, experts, up, down, bias, "", S(0))
    return result.detach(), list(torch.autograd.grad(result, leaves, seed))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("lie", TOKENS_LIE, ids=str)
@pytest.mark.parametrize("kind", ["T", "D", "E"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_each_way_equals_one_rank(routing, kind, lie, size):
    experts, seed = ROUTINGS[routing], torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    value, gradients = whole(experts, seed)
    cut = [split_shards(t, lie, size) for t in (inputs()[0], experts, seed)]
    of_experts = S(0) if kind != "T" else None

    def rank(r: int) -> tuple[Tensor, list[Tensor]]:
        weights = [
            (split_shards(w, of_experts, size)[r] if of_experts else w).requires_grad_()
            for w in inputs()[1:3]
        ]
        bias, own = inputs()[3].requires_grad_(), cut[0][r].clone().requires_grad_()
        leaves = [own, *weights, bias]
        if kind == "E":
            x, ids = (
                redistribute(own, str(lie), "R", AXIS),
                redistribute(cut[1][r], str(lie), "R", AXIS),
            )
            result = redistribute(layer(x, ids, *weights, bias, kind, lie), "P", str(lie), AXIS)
        else:
            result = layer(own, cut[1][r], *weights, bias, kind, lie)
        return result.detach(), list(torch.autograd.grad(result, leaves, cut[2][r]))

    results = run_ranks(size, rank, AXIS)
    parts = [list(each) for each in zip(*(found for _, found in results), strict=True)]

    def joined(pieces: list[Tensor], place: Placement | None) -> Tensor:
        return join_shards(pieces, place) if place else torch.stack(pieces).sum(0)

    torch.testing.assert_close(joined([v for v, _ in results], lie), value, rtol=BOUND, atol=BOUND)
    places = (lie, of_experts, of_experts, None)
    for pieces, place, expected in zip(parts, places, gradients, strict=True):
        torch.testing.assert_close(joined(pieces, place), expected, rtol=BOUND, atol=BOUND)


def test_a_route_that_is_no_transition_is_refused():
    ends = torch.ones(EXPERTS, dtype=torch.int32)
    with pytest.raises(PlacementError, match="no transition from T to P"):
        run_ranks(2, lambda _: route(torch.ones(4, 2), ends, "T", "P", AXIS), AXIS)

"""The figures of context parallelism: what is counted, and that another loss is refused."""

from dataclasses import replace

import pytest

from benchmarks.context_parallel import WAYS, Figure, fields_of, of_most, run_rank, show
from ilm_compile.errors import IlmCompileError
from tests.support.world import World

TOKENS = 64


def run(rank: int) -> list[Figure]:
    return run_rank(2, TOKENS, 1, fields_of(64, 1))


def test_every_way_does_the_same_work_and_all_ranks_as_much(world2: World) -> None:
    ways = [of_most(ranks) for ranks in zip(*world2.run(run), strict=True)]
    assert tuple(way.attention for way in ways) == WAYS
    assert [way.balance for way in ways] == pytest.approx([1.0] * len(WAYS), abs=0.01)
    heads, *others = ways
    for way in others:
        assert 0 < way.flops < heads.flops  # keys that no query sees are not read
        assert way.loss == pytest.approx(heads.loss, rel=1e-5)
    assert min(size for way in ways for size in (way.saved_bytes, way.sent_bytes)) > 0


def figure(cp: int, flops: int, loss: float) -> Figure:
    return Figure(TOKENS, cp, "queries", 1, 1, flops, 1.0, loss)


def test_balance_is_the_busiest_rank_against_the_mean() -> None:
    assert of_most([figure(2, 1, 2.0), figure(2, 3, 2.0)]).balance == 1.5


def test_another_loss_than_that_of_one_rank_is_refused() -> None:
    one = figure(1, 1, 2.0)
    with pytest.raises(IlmCompileError, match=r"the loss 2.0 of cp=1, got 2.1 at 64 tokens, cp=2"):
        show([one, replace(one, cp=2, loss=2.1)])

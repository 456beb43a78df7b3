"""Collectives over a process group: what comes back, and what is counted as sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from ilm_compile.runtime.communicator import MeasuredCommunicator, communicator_over
from tests.support.world import World

ROWS = 4
# How many rows rank 0 and rank 1 send to each: uneven, nothing at all, everything to one.
SENT = [[[1, 3], [4, 0]], [[4, 0], [0, 4]], [[0, 4], [0, 4]]]


def everyone() -> MeasuredCommunicator:
    return communicator_over(dist.group.WORLD)


def rows_of(rank: int) -> torch.Tensor:
    return torch.arange(ROWS * 3.0).view(ROWS, 3) + 100 * rank


def exchange(rank: int, sent: list[list[int]]) -> tuple[torch.Tensor, int, int, int]:
    them = everyone()
    them.waits = []
    # as autograd hands it over: not contiguous
    x = rows_of(rank).t().contiguous().t()
    result = them.exchange(x, sent[rank], [counts[rank] for counts in sent])
    counted = them.stats["all_to_all"]
    return result, counted.calls, counted.num_bytes, len(them.waits)


@pytest.mark.parametrize("sent", SENT, ids=str)
def test_exchanged_rows_come_in_rank_order(world2: World, sent: list[list[int]]) -> None:
    results = world2.run(exchange, sent)
    for rank, (rows, calls, num_bytes, waits) in enumerate(results):
        parts = [rows_of(other).split(counts)[rank] for other, counts in enumerate(sent)]
        assert torch.equal(rows, torch.cat(parts))
        away = sent[rank][1 - rank]
        assert (calls, num_bytes, waits) == (1, away * 3 * 4, 1)


def shift(rank: int) -> tuple[list[torch.Tensor], int, int, int]:
    them = everyone()
    them.waits = []
    xs = [rows_of(rank).t(), torch.tensor([rank])]  # not contiguous, and of another shape
    found = them.shift(xs)()
    counted = them.stats["shift"]
    return found, counted.calls, counted.num_bytes, len(them.waits)


def test_what_is_shifted_comes_from_the_rank_before(world4: World) -> None:
    for rank, ((rows, number), calls, num_bytes, waits) in enumerate(world4.run(shift)):
        before = (rank - 1) % 4
        assert torch.equal(rows, rows_of(before).t())
        assert number.item() == before
        assert (calls, num_bytes, waits) == (1, ROWS * 3 * 4 + 8, 1)


def test_an_axis_of_one_rank_keeps_its_rows_and_sends_nothing() -> None:
    alone = communicator_over(None)
    x = rows_of(0)
    result = alone.exchange(x, [ROWS], [ROWS])
    assert torch.equal(result, x)
    assert result is not x
    assert torch.equal(alone.shift([x])()[0], x)
    assert alone.stats == {}

"""Ranks as threads: collectives by meeting, and no rank left waiting."""

from __future__ import annotations

import pytest
import torch

from ilm_compile.program.communicator import communicator
from ilm_compile.proof.threads import run_groups, run_ranks

SIZE = 3
X = torch.arange(SIZE * 2.0).reshape(SIZE, 2)  # rank r holds X + 10 r
# In an exchange of rows, rank s sends s of its rows to the first rank and the rest to the last.
RECEIVED = [[0, 1, 2], [0, 0, 0], [3, 2, 1]]

COLLECTIVES = {
    "all_reduce": (lambda c, x: c.all_reduce(x), lambda r, all_: sum(all_)),
    "maximum": (lambda c, x: c.all_reduce(x, op="max"), lambda r, all_: all_[-1]),
    "all_gather": (lambda c, x: c.all_gather(x), lambda r, all_: torch.stack(all_)),
    "reduce_scatter": (lambda c, x: c.reduce_scatter(x), lambda r, all_: sum(all_)[r]),
    "all_to_all": (
        lambda c, x: c.all_to_all(x),
        lambda r, all_: torch.stack([x[r] for x in all_]),
    ),
    "exchange": (
        lambda c, x: c.exchange(x, [c.rank, 0, SIZE - c.rank], RECEIVED[c.rank]),
        lambda r, all_: torch.cat(
            [torch.split(x, [s, 0, SIZE - s])[r] for s, x in enumerate(all_)]
        ),
    ),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_collective(name):
    act, expect = COLLECTIVES[name]
    everyone = [X + 10 * rank for rank in range(SIZE)]

    results = run_ranks(SIZE, lambda rank: act(communicator("tp"), everyone[rank]))

    for rank, result in enumerate(results):
        assert torch.equal(result, expect(rank, everyone))


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_rank_may_write_where_it_sent_from_once_its_call_has_ended(name):
    act, expect = COLLECTIVES[name]
    everyone = [X + 10 * rank for rank in range(SIZE)]

    def rank(r):
        x = everyone[r].clone()
        result = act(communicator("tp"), x)
        x.fill_(torch.nan)
        return result

    for r, result in enumerate(run_ranks(SIZE, rank)):
        assert torch.equal(result, expect(r, everyone))


def test_groups_do_not_meet():
    def total(group, rank):
        return float(communicator("tp").all_reduce(torch.tensor(float(10 * group + rank))))

    assert run_groups(2, {"tp": 2}, total) == [[1.0, 1.0], [21.0, 21.0]]


def test_the_first_error_is_raised_and_the_others_are_released():
    released = []

    def fail(group, rank):
        if rank == 1:
            raise RuntimeError("rank 1 has had enough")
        communicator("tp").all_reduce(torch.zeros(()))

    with pytest.raises(RuntimeError, match="rank 1 has had enough"):
        run_groups(2, {"tp": 2}, fail, on_failure=lambda: released.append(True))
    assert released

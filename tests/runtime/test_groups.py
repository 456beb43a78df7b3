"""How many process groups a rank makes, and that those of a line reach each other.

Large worlds are torch's fake process group: one process that believes to be a rank of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Mesh
from ilm_compile.runtime.groups import own_group
from tests.support.world import World

TIMEOUT = timedelta(seconds=20)
CPU = torch.device("cpu")


@contextmanager
def rank_of(size: int, rank: int) -> Iterator[list[list[int] | None]]:
    """Be this rank of a large world. Yields the ranks of the groups that it makes."""
    made: list[list[int] | None] = []
    new_group = dist.new_group

    def noting(ranks: list[int] | None = None, *args: object, **options: object) -> object:
        made.append(ranks)
        return new_group(ranks, *args, **options)

    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        with mock.patch.object(dist, "new_group", noting):
            yield made
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dp", [2, 16, 128])
@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_makes_the_groups_of_its_own_lines(dp: int, rank: int) -> None:
    size = 8 * 8 * dp
    rank %= size
    with rank_of(size, rank) as made:
        mesh = Mesh.create(Plan(tp=8, pp=8), device="cpu")
        mesh.pipeline_group((0, 7))
        Mesh.create(Plan(tp=8, pp=8), device="cpu")
    *lines, tied = [ranks for ranks in made if ranks is not None]
    assert [len(line) for line in lines] == [8, dp, 1, 8]  # pp, dp and fsdp, cp, tp
    assert all(rank in line for line in [*lines, tied])
    assert len(tied) == 2
    assert len(made) == 6  # these, and all ranks once


def test_axes_of_one_rank_share_one_group() -> None:
    with rank_of(16, 3) as made:
        mesh = Mesh.create(Plan(), device="cpu")
        assert (mesh.tp.group, mesh.tp.group.size()) == (mesh.pp.group, 1)
    assert made == [None, [3], list(range(16))]


def sums(rank: int, plan: Plan, pp_ranks: tuple[int, ...]) -> list[float]:
    """The sum of the ranks over each axis, and over these pipeline ranks where this is one."""
    mesh = Mesh.create(plan)
    groups = [axis.group for axis in (mesh.pp, mesh.dp, mesh.tp, mesh.fsdp)]
    groups.append(mesh.pipeline_group(pp_ranks))
    found = []
    for group in groups:
        value = torch.tensor(float(rank))
        if group is not None:
            dist.all_reduce(value, group=group)
        found.append(value.item())
    return found


def test_lines_reach_each_other(world4: World) -> None:
    assert world4.run(sums, Plan(pp=4), (0, 3)) == [
        [6, 0, 0, 0, 3],
        [6, 1, 1, 1, 1],
        [6, 2, 2, 2, 2],
        [6, 3, 3, 3, 3],
    ]
    assert world4.run(sums, Plan(tp=2), (0,)) == [
        [0, 2, 1, 2, 0],
        [1, 4, 1, 4, 1],
        [2, 2, 5, 2, 2],
        [3, 4, 5, 4, 3],
    ]


def beside_own_group(rank: int) -> float:
    """A sum over a line where two of four ranks are in a group of the user's besides."""
    own = dist.new_group([0, 1])
    value = torch.tensor(float(rank))
    dist.all_reduce(value, group=own_group([[0, 3], [1, 2]], TIMEOUT, CPU))
    if rank < 2:
        dist.destroy_process_group(own)
    return value.item()


def test_groups_of_the_user_that_not_all_ranks_are_in(world4: World) -> None:
    assert world4.run(beside_own_group) == [3, 3, 3, 3]

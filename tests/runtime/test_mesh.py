"""Who sits where, worlds that do not fit the plan, and how processes find each other.

The world's own group stays as it is in meetings; its store, like torchrun's, keeps what they leave.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist

from ilm_compile.errors import PlanError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Mesh, meeting
from ilm_compile.runtime.mesh import fit_world
from ilm_compile.training import ParallelMode, ProcessGroups
from tests.support.world import World

LONG, SHORT = timedelta(seconds=60), timedelta(seconds=2)


def coordinates(rank: int, plan: Plan) -> tuple[tuple[int, int], ...]:
    mesh = Mesh.create(plan)
    assert mesh.rank == rank
    assert [mesh.device_mesh.get_local_rank(name) for name in ("pp", "dp", "tp")] == [
        axis.rank for axis in (mesh.pp, mesh.dp, mesh.tp)
    ]
    return tuple((axis.rank, axis.size) for axis in (mesh.pp, mesh.dp, mesh.tp))


def test_tp_is_the_fastest_axis_and_pp_the_slowest(world4: World) -> None:
    assert world4.run(coordinates, Plan(tp=2, pp=2)) == [
        ((0, 2), (0, 1), (0, 2)),
        ((0, 2), (0, 1), (1, 2)),
        ((1, 2), (0, 1), (0, 2)),
        ((1, 2), (0, 1), (1, 2)),
    ]
    assert world4.run(coordinates, Plan(tp=2)) == [
        ((0, 1), (0, 2), (0, 2)),
        ((0, 1), (0, 2), (1, 2)),
        ((0, 1), (1, 2), (0, 2)),
        ((0, 1), (1, 2), (1, 2)),
    ]


def test_dp_is_what_the_world_leaves_or_what_the_plan_says(world4: World) -> None:
    assert world4.run(dp_found, Plan(tp=2)) == [2] * 4
    assert world4.run(dp_found, Plan(tp=2, dp=2)) == [2] * 4
    with pytest.raises(RuntimeError, match=r"world size of tp\*pp\*dp = 2\*1\*3 = 6, got 4"):
        world4.run(dp_found, Plan(tp=2, dp=3))


def dp_found(rank: int, plan: Plan) -> int | None:
    return fit_world(plan).dp


def groups_by_kind(rank: int) -> dict[str, list[int]]:
    """The ranks of each group of one with ep=2 and cp=2, or dp=2, as the groups have them."""
    found = {}
    for second in ("cp", "dp"):
        mesh = Mesh.create(Plan(ep=2, cp=2 if second == "cp" else 1))
        groups = ProcessGroups(mesh)
        for mode in ParallelMode:
            ranks = groups.get_ranks_in_group(mode)
            assert dist.get_process_group_ranks(groups.get_group(mode)) == ranks
            assert ranks.index(rank) == groups.get_local_rank(mode)
            found[f"{second} {mode.name}"] = ranks
    return found


def test_experts_are_shared_by_the_ranks_that_are_elsewhere_on_ep(world4: World) -> None:
    found = world4.run(groups_by_kind)
    everyone = [0, 1, 2, 3]
    for rank in everyone:
        neighbours, others = [[0, 1], [2, 3]][rank // 2], [[0, 2], [1, 3]][rank % 2]
        assert found[rank] == {
            "cp GLOBAL": everyone, "cp DATA": [rank], "cp TENSOR": [rank], "cp PIPELINE": [rank],
            "cp ZERO1": everyone, "cp EXPERT": others, "cp EXPERT_DATA": neighbours,
            "dp GLOBAL": everyone, "dp DATA": others, "dp TENSOR": [rank], "dp PIPELINE": [rank],
            "dp ZERO1": everyone, "dp EXPERT": neighbours, "dp EXPERT_DATA": others,
        }  # fmt: skip


def test_one_process_without_torchrun_has_no_group() -> None:
    mesh = Mesh.create(Plan())
    assert (mesh.world_size, mesh.rank, mesh.is_distributed) == (1, 0, False)


def test_several_processes_must_be_started_by_torchrun() -> None:
    command = "torchrun --nproc-per-node=4 script.py"
    with pytest.raises(PlanError, match=f"tp=2, pp=2 needs 4 .* started by torchrun: {command}"):
        Mesh.create(Plan(tp=2, pp=2))


def wrong_world(rank: int, plan: Plan) -> str:
    with pytest.raises(PlanError) as info:
        Mesh.create(plan)
    return str(info.value)


@pytest.mark.parametrize(
    ("plan", "sizes"),
    [(Plan(tp=3, pp=2), "tp*pp = 3*2"), (Plan(ep=3, pp=2), "tp*pp*ep = 1*2*3")],
    ids=["tp", "ep"],
)
def test_a_world_of_the_wrong_size_is_refused_with_one_that_works(
    world4: World, plan: Plan, sizes: str
) -> None:
    for text in world4.run(wrong_world, plan):
        assert f"a multiple of {sizes} = 6, got 4 processes" in text
        assert "torchrun --nproc-per-node=6 script.py" in text


def greet_twice(rank: int) -> tuple[bytes, bool]:
    """What the next rank says, and whether anything is left of it in a second meeting."""
    neighbour = f"address/{(rank + 1) % 4}"
    store = meeting.meet(LONG)
    store.set(f"address/{rank}", f"rank {rank}")
    return store.get(neighbour), meeting.meet(LONG).check([neighbour])


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What is told meanwhile."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    meeting.LOGGER.addHandler(handler)
    try:
        yield told
    finally:
        meeting.LOGGER.removeHandler(handler)


def meet_without(rank: int, absent: int) -> tuple[str, list[str]]:
    """The error and the warnings where one rank does not come."""
    if rank == absent:
        return "", []
    with warnings() as told, pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "NOTICE_S", 1.0)
        with pytest.raises(PlanError) as info:
            meeting.meet(SHORT)
    return str(info.value), told


def restartable(rank: int, restarts: int, meets: bool) -> list[str]:
    """What is told of a group made outside, under torchrun with this many restarts."""
    with warnings() as told, pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "_met", set())
        patch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
        if meets:
            meeting.meet(LONG)
        Mesh.create(Plan())
    return told


def test_a_group_that_no_restart_survives_is_told_by_rank_0(world4: World) -> None:
    first, *others = world4.run(restartable, 3, False)
    assert len(first) == 1
    assert "restart this job (--max-restarts=3), but the process group was made by" in first[0]
    assert "leave the call to parallelize, or give it store=ilm_compile.runtime.meet" in first[0]
    assert others == [[], [], []]


@pytest.mark.parametrize(("restarts", "meets"), [(0, False), (3, True)])
def test_a_group_that_is_not_restarted_or_survives_is_not_told_of(
    world4: World, restarts: int, meets: bool
) -> None:
    assert world4.run(restartable, restarts, meets) == [[], [], [], []]


@pytest.mark.parametrize("absent", [3, 0])
def test_who_does_not_come_is_named_by_all_and_holds_up_no_later_meeting(
    world4: World, absent: int
) -> None:
    for rank, (error, told) in enumerate(world4.run(meet_without, absent)):
        if rank != absent:
            (notice,) = told
            assert notice.startswith(f"start: rank {rank} waits for rank {absent} of 4, ")
            assert error.startswith(f"start: rank {absent} of 4 did not come within 2 s; see what")
    heard = [(f"rank {rank}".encode(), False) for rank in (1, 2, 3, 0)]
    assert world4.run(greet_twice) == heard


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "no-such-host.invalid"}, r"no-such-host\.invalid is no host that"),
        ({"MASTER_PORT": "none"}, "expected a number in the variable MASTER_PORT, got 'none'"),
        ({"MASTER_PORT": None}, "WORLD_SIZE is set but MASTER_PORT is not; start the job with"),
        ({"RANK": "1"}, "MASTER_ADDR=127.0.0.1 MASTER_PORT=1 does not answer"),
        ({"MASTER_ADDR": "192.0.2.1"}, "MASTER_PORT=1 cannot be served by rank 0"),
    ],
    ids=["host", "port", "variable", "nobody there", "another's address"],
)
def test_a_place_to_meet_that_is_none_is_named(
    variables: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (place | variables).items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(PlanError, match=message):
        meeting.meet(timedelta(seconds=1))

"""Who sits where, and worlds that do not fit the plan."""

from datetime import timedelta

import pytest
import torch

from ilm_compile.errors import PlanError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Mesh
from ilm_compile.runtime.mesh import join_job
from tests.support.world import World


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


def test_one_process_without_torchrun_has_no_group() -> None:
    mesh = Mesh.create(Plan())
    assert (mesh.world_size, mesh.rank, mesh.is_distributed) == (1, 0, False)


def test_several_processes_must_be_started_by_torchrun() -> None:
    command = "torchrun --nproc-per-node=4 script.py"
    with pytest.raises(PlanError, match=f"tp=2, pp=2 needs 4 .* started by torchrun: {command}"):
        Mesh.create(Plan(tp=2, pp=2))


def wrong_world(rank: int) -> str:
    with pytest.raises(PlanError) as info:
        Mesh.create(Plan(tp=3, pp=2))
    return str(info.value)


def test_a_world_of_the_wrong_size_is_refused_with_one_that_works(world4: World) -> None:
    for text in world4.run(wrong_world):
        assert "a multiple of tp*pp = 3*2 = 6, got 4 processes" in text
        assert "torchrun --nproc-per-node=6 script.py" in text


def test_a_host_that_nobody_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    with pytest.raises(PlanError, match=r"MASTER_ADDR=no-such-host\.invalid is no host that"):
        join_job(torch.device("cpu"), timeout=timedelta(seconds=1))

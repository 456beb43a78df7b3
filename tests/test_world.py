"""The test worlds themselves: results by rank, torchrun's environment, and every way to fail."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.prepared import Prepared
from tests.support.world import World, WorldError, run_world


def add_ranks(rank: int, offset: float) -> torch.Tensor:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return total


def environment(rank: int) -> dict[str, str]:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names}


def process_id(rank: int) -> int:
    return os.getpid()


def fail_on_one_rank(rank: int) -> None:
    if rank == 1:
        raise KeyError("planted on rank 1")
    dist.barrier()


def die_on_one_rank(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def sleep(rank: int, seconds: float) -> None:
    time.sleep(seconds)


def mismatched_collectives(rank: int) -> None:
    dist.all_reduce(torch.ones(2 + rank))


def test_results_come_back_by_rank(world2: World) -> None:
    first, second = world2.run(add_ranks, 0.5)
    assert first.item() == second.item() == 2.0


def test_each_rank_sees_what_torchrun_sets(world2: World) -> None:
    for rank, seen in enumerate(world2.run(environment)):
        assert seen == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }


def test_processes_stay_between_calls(world2: World) -> None:
    assert world2.run(process_id) == world2.run(process_id)


def test_a_failing_rank_gives_its_traceback_at_once(world2: World) -> None:
    started = time.monotonic()
    with pytest.raises(WorldError, match=r"(?s)rank 1 of 2 failed.*in fail_on_one_rank.*planted"):
        world2.run(fail_on_one_rank)
    assert time.monotonic() - started < 30


def test_a_dead_rank_is_named_with_its_exit_code(world2: World) -> None:
    # Rank 0 may see the lost connection before the parent sees the death.
    with pytest.raises(WorldError, match=r"rank 1 of 2 died with exit code -9|onnection"):
        world2.run(die_on_one_rank)


def test_a_silent_rank_is_named_after_the_timeout(world2: World) -> None:
    world2.run(sleep, 0.0)
    with pytest.raises(WorldError, match=r"sleep: ranks \[0, 1\] gave no answer within 0.5 s"):
        world2.run(sleep, 60.0, timeout=0.5)


def test_the_world_starts_again_after_a_failure(world2: World) -> None:
    with pytest.raises(WorldError):
        world2.run(fail_on_one_rank)
    assert [total.item() for total in world2.run(add_ranks, 0.0)] == [1.0, 1.0]


def test_debug_finds_mismatched_collectives() -> None:
    with pytest.raises(WorldError, match="mismatch"):
        run_world(mismatched_collectives, 2, debug=True)


# Ranks that are forked from what one process has prepared

_kept: list[int] = []  # of the process that prepares, by call


def prepare(size: int, fault: str = "") -> None:
    _kept.append(os.getpid())
    if fault == "prepare":
        raise KeyError("planted in prepare")
    if fault == "thread":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def kept_on_rank(rank: int, fault: str = "") -> tuple[int, list[int], float]:
    if fault == "rank" and rank == 1:
        raise KeyError("planted on rank 1")
    if fault == "death" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getppid(), _kept, float(add_ranks(rank, 0.0))


def test_ranks_are_forked_from_the_process_that_keeps_what_it_prepared() -> None:
    with Prepared() as prepared:
        for num_calls, size in enumerate((2, 3), start=1):
            found = prepared.run(prepare, kept_on_rank, size)
            parents = {parent for parent, _, _ in found}
            assert len(parents) == 1
            assert [kept for _, kept, _ in found] == [[*parents] * num_calls] * size
            assert {total for *_, total in found} == {size * (size - 1) / 2}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("prepare", "(?s)in prepare.*planted in prepare"),
        ("rank", "(?s)rank 1 of 2 failed.*planted on rank 1"),
        ("death", "rank 1 of 2 died with exit code -9|onnection"),
    ],
)
def test_a_failure_is_told_and_the_next_call_starts_anew(fault: str, told: str) -> None:
    with Prepared() as prepared:
        with pytest.raises(WorldError, match=told):
            prepared.run(prepare, kept_on_rank, 2, fault)
        (parent, kept, _), _ = prepared.run(prepare, kept_on_rank, 2)
        assert kept == [parent]


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="there threads are expected")
def test_a_process_with_other_threads_is_not_forked() -> None:
    with Prepared() as prepared, pytest.raises(WorldError, match="prepare left threads running"):
        prepared.run(prepare, kept_on_rank, 2, "thread")

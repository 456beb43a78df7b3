"""The executor alone: hand-over on one rank, timeline, bytes, unused values, and dead processes."""

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ilm_compile.ops.products import leaving_weight
from ilm_compile.program.lowered import Boundary, Stage
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Mesh, Parallel
from ilm_compile.runtime.executor import Executor
from ilm_compile.schedule import Action, Schedule, build, check, insert_comms
from tests.runtime.handmade import (
    HIDDEN,
    ROWS,
    SEQ,
    lower_by_hand,
    make_batch,
    make_model,
    make_parallel,
)
from tests.support.world import World, WorldError

FLOAT64_BYTES = 8


class First(nn.Module):
    """Sends a value that the next stage uses and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.weight, x + self.weight


class Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 5.0))

    def forward(self, used: Tensor, unused: Tensor) -> tuple[Tensor]:
        return ((used * self.weight).sum(),)


def two_stages() -> tuple[Stage, Stage]:
    crossing = (
        Boundary("used", (3,), torch.float32, True),
        Boundary("unused", (3,), torch.float32, True),
    )
    return (
        Stage(0, First(), ("x",), (), crossing, (), {}),
        Stage(1, Second(), (), crossing, (), ("loss",), {}),
    )


def schedule_of(*rows: str) -> Schedule:
    actions = [[Action.parse(text) for text in row.split()] for row in rows]
    return insert_comms(Schedule.from_rows("test", actions))


def test_stages_on_one_rank_hand_over_in_memory() -> None:
    stages = two_stages()
    schedule = schedule_of("0F0 1F0 0F1 1F1 1B1 1B0 0B0 0B1")
    check(schedule)
    executor = Executor(stages, schedule, Mesh.create(Plan()))
    x = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])]
    result = executor.run({"x": x}, loss_gradient=0.5)
    assert [loss.item() for loss in result.losses] == [60.0, 150.0]
    assert stages[0].module.weight.grad.tolist() == [12.5, 17.5, 22.5]
    assert stages[1].module.weight.grad.tolist() == [5.0, 7.0, 9.0]


class Product(nn.Module):
    """A stage of one product, as `lower` writes it for a schedule with weight parts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 2))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (leaving_weight(torch.ops.aten.linear.default)(x, self.weight).sum(),)


@pytest.mark.parametrize(
    ("row", "expected"),  # what has ended before the weight's gradient is there, and its values
    [
        ("0F0 0F1 0B0 0B1 0W1 0W0", [("0B1", [30.0, 40.0]), ("0W1", [31.0, 42.0])]),
        ("0F0 0F1 0B0 0W0 0B1 0W1", [("0F1", [1.0, 2.0]), ("0W0", [31.0, 42.0])]),
    ],
    ids=["later", "at once where nothing runs between"],
)
def test_the_gradient_of_a_weight_comes_with_the_weight_part_of_its_micro_batch(
    row: str, expected: list[tuple[str, list[float]]]
) -> None:
    schedule = schedule_of(row)
    stage = Stage(0, Product(), ("x",), (), (), ("loss",), {})
    executor = Executor((stage,), schedule, Mesh.create(Plan()))
    executor.record_timeline = True
    seen: list[tuple[str, list[float]]] = []

    def note(weight: Tensor) -> None:
        assert weight.grad is not None
        seen.append((executor.timeline[-1][0], weight.grad.flatten().tolist()))

    stage.module.weight.register_post_accumulate_grad_hook(note)
    x = [torch.tensor([[1.0, 2.0]]), torch.tensor([[30.0, 40.0]])]
    executor.annotate = True
    with torch.profiler.profile() as profile:
        executor.run({"x": x}, loss_gradient=1.0)
    assert seen == expected
    assert "0W1 stage 0 weights micro-batch 1" in {event.name for event in profile.events()}


def send_unused(rank: int) -> Any:
    stages = two_stages()
    schedule = build("1f1b", pp=2, num_microbatches=2)
    executor = Executor(stages, schedule, Mesh.create(Plan(pp=2)))
    x = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])]
    executor.run({"x": x}, loss_gradient=0.5)
    return stages[rank].module.weight.grad.tolist()


def test_a_value_nobody_uses_gets_a_gradient_of_zero(world2: World) -> None:
    assert world2.run(send_unused) == [[12.5, 17.5, 22.5], [5.0, 7.0, 9.0]]


def record(rank: int, forward_only: bool) -> tuple[list[str], int]:
    parallel = make_parallel(Plan(pp=2, num_microbatches=3), make_model())
    parallel.executor.record_timeline = True
    parallel.execute_schedule(make_batch(3 * ROWS), forward_only=forward_only)
    timeline = parallel.executor.timeline
    assert all(start <= end for _, start, end in timeline)
    assert [start for _, start, _ in timeline] == sorted(start for _, start, _ in timeline)
    return [text for text, _, _ in timeline], parallel.traffic()["p2p"].num_bytes


def test_the_timeline_is_the_schedule(world2: World) -> None:
    schedule = build("1f1b", pp=2, num_microbatches=3)
    for rank, (texts, _) in enumerate(world2.run(record, False)):
        actions = " ".join(text for text in texts if not text.startswith("wait")).split()
        assert actions == [str(action) for action in schedule.actions[rank]]
        waits = [text for text in texts if text.startswith("wait")]
        assert len(waits) == 3, "one wait per received micro-batch"


def test_bytes_sent_are_counted(world2: World) -> None:
    x = ROWS * SEQ * HIDDEN * FLOAT64_BYTES
    relayed = ROWS * SEQ * FLOAT64_BYTES
    assert [sent for _, sent in world2.run(record, False)] == [3 * (x + relayed), 3 * x]
    assert [sent for _, sent in world2.run(record, True)] == [3 * (x + relayed), 0]


def fail_in_a_backward(rank: int, signal_number: int) -> None:
    """Rank 1 sends itself a signal within its second backward; rank 0 tells of its own error."""
    plan = Plan(pp=2, num_microbatches=4)
    mesh = Mesh.create(plan, timeout=timedelta(seconds=2))
    lowered = lower_by_hand(plan)
    schedule = build("1f1b", pp=2, num_microbatches=4)
    parallel = Parallel(lowered, schedule, mesh, make_model())
    backwards = []

    def fail(grad: Tensor) -> None:
        backwards.append(grad)
        if len(backwards) == 2:
            os.kill(os.getpid(), signal_number)

    if rank == 1:
        lowered.stages[1].module.get_parameter("block_0.norm").register_hook(fail)
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        parallel.execute_schedule(make_batch(4 * ROWS))
    elapsed = time.monotonic() - start
    assert elapsed < 10
    raise TimeoutError(f"rank {rank} gave up")


def test_a_rank_killed_within_a_step_ends_the_others(world2: World) -> None:
    with pytest.raises(WorldError, match=r"rank 1 of 2 died|rank 0 gave up"):
        world2.run(fail_in_a_backward, signal.SIGKILL, timeout=30)


def test_a_rank_that_hangs_within_a_step_ends_the_others(world2: World) -> None:
    with pytest.raises(WorldError, match="rank 0 gave up"):
        world2.run(fail_in_a_backward, signal.SIGSTOP, timeout=30)

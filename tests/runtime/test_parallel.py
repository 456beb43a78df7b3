"""Real processes over gloo: loss and gradients of the model on one device, for every plan."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ilm_compile.program.plan import Plan
from tests.runtime.handmade import ROWS, make_batch, make_model, make_parallel
from tests.support.world import World

TOLERANCE = 1e-10


def reference(batch: dict[str, Tensor], *, tied: bool) -> tuple[float, dict[str, Tensor]]:
    model = make_model(tied=tied)
    loss = model(**batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def run_step(rank: int, plan: Plan, tied: bool, num_steps: int = 1) -> dict[str, Any]:
    """One forward and backward; what each rank saw."""
    parallel = make_parallel(plan, make_model(tied=tied), tied=tied)
    dp = parallel.mesh.dp.size
    batch = make_batch(ROWS * plan.num_microbatches * dp)
    for _ in range(num_steps):
        loss = parallel.execute_schedule(batch)
    return {
        "loss": loss.item(),
        "gradients": parallel.full_gradients(),
        "norm": parallel.grad_norm().item(),
        "dp": dp,
        "state": parallel.full_state_dict(),
    }


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        error = (actual[name] - value).abs().max() / value.abs().max()
        assert error <= TOLERANCE, f"{name}: relative error {error}"


PLANS = [
    Plan(tp=2, num_microbatches=2),
    Plan(pp=2, num_microbatches=3),
    Plan(pp=2, num_microbatches=1),
    Plan(pp=2, num_microbatches=4, schedule="gpipe"),
    Plan(pp=2, num_microbatches=4, num_chunks=2, schedule="interleaved_1f1b"),
    Plan(pp=2, num_microbatches=4, num_chunks=2, schedule="gpipe"),
    Plan(num_microbatches=3, zero=1),
    Plan(num_microbatches=3, zero=3),
]
PLANS_OF_FOUR = [
    Plan(pp=4, num_microbatches=6),
    Plan(pp=2, tp=2, num_microbatches=2),
    Plan(pp=2, num_microbatches=3, zero=1),
    Plan(pp=2, num_microbatches=3, zero=3),
    Plan(tp=2, num_microbatches=2, zero=3),
    Plan(pp=2, num_microbatches=4, num_chunks=2, schedule="interleaved_1f1b", zero=3),
    Plan(num_microbatches=2, zero=1),
]


def name(plan: Plan) -> str:
    fields = ("tp", "pp", "num_chunks", "num_microbatches", "zero")
    return "-".join([plan.schedule, *(f"{field}{getattr(plan, field)}" for field in fields)])


def check_step(world: World, plan: Plan, tied: bool) -> None:
    results = world.run(run_step, plan, tied)
    batch = make_batch(ROWS * plan.num_microbatches * results[0]["dp"])
    loss, gradients = reference(batch, tied=tied)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    assert_equal(results[0]["gradients"], gradients)
    for result in results:
        assert result["loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert result["norm"] == pytest.approx(norm, rel=TOLERANCE)
        assert result["loss"] == results[0]["loss"], "the loss must have the same bits everywhere"
    for result in results[1:]:
        assert result["gradients"] == {} == result["state"]
    model = make_model(tied=tied)
    assert set(results[0]["state"]) == set(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(results[0]["state"][key], value), key


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("plan", PLANS, ids=name)
def test_two_processes_equal_one_device(world2: World, plan: Plan, tied: bool) -> None:
    check_step(world2, plan, tied)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("plan", PLANS_OF_FOUR, ids=name)
def test_four_processes_equal_one_device(world4: World, plan: Plan, tied: bool) -> None:
    check_step(world4, plan, tied)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_process_needs_no_process_group(tied: bool) -> None:
    plan = Plan(num_microbatches=3)
    parallel = make_parallel(plan, make_model(tied=tied), tied=tied)
    batch = make_batch(ROWS * 3)
    loss, gradients = reference(batch, tied=tied)
    assert parallel.execute_schedule(batch).item() == pytest.approx(loss, rel=TOLERANCE)
    assert_equal(parallel.full_gradients(), gradients)

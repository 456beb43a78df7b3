"""plan="auto": the fastest plan predicted for the world, which trains as the model does."""

from math import prod
from typing import Any

import pytest
import torch

import ilm_compile
from ilm_compile.automatic import automatic_plans
from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_tiny
from ilm_compile.program.plan import Plan
from tests.support.world import World

ROWS, SEQ = 2, 16
INPUTS = {name: ((ROWS, SEQ), torch.int64) for name in ("input_ids", "labels")}
CPU = torch.device("cpu")


def plans(world_size: int, tokens: int | None, **given: Any) -> list[Plan]:
    traced = ilm_compile.trace(internlm2_tiny(), example_inputs=INPUTS)
    return list(
        automatic_plans(traced, given, world_size=world_size, device=CPU, tokens_per_batch=tokens)
    )


def test_plans_are_for_the_world_and_the_micro_batch() -> None:
    found = plans(4, 16 * ROWS * SEQ)
    assert found
    for plan in found:
        assert plan.ranks_per_replica * (plan.dp or 1) == 4
        assert plan.num_microbatches * (plan.dp or 1) == 16
        assert plan.hardware == "cpu"


def test_what_is_given_is_kept() -> None:
    found = plans(4, 16 * ROWS * SEQ, tp=2, seed=7, hardware="h100")
    assert found
    assert {(plan.tp, plan.seed, plan.hardware) for plan in found} == {(2, 7, "h100")}


def test_the_batch_must_be_said() -> None:
    with pytest.raises(PlanError, match='plan="auto" needs tokens_per_batch'):
        plans(4, None)


def test_no_plan_is_said_with_what_was_asked() -> None:
    with pytest.raises(PlanError, match=r"none of \d+ plans for 4 ranks .* 2 rows, tp=3"):
        plans(4, 16 * ROWS * SEQ, tp=3)


def train(rank: int) -> tuple[list[int], float]:
    model = internlm2_tiny()
    parallel = ilm_compile.parallelize(
        model, plan="auto", tokens_per_batch=8 * ROWS * SEQ, example_inputs=INPUTS
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (8 * ROWS, SEQ), generator=generator)
    loss = parallel.execute_schedule({"input_ids": ids, "labels": ids})
    mesh = parallel.mesh
    return [axis.size for axis in (mesh.pp, mesh.dp, mesh.tp)], float(loss)


def test_ranks_find_the_same_plan_and_train(world2: World) -> None:
    (sizes, loss), (others, same) = world2.run(train)
    assert sizes == others
    assert prod(sizes) == 2
    assert loss == same
    model = internlm2_tiny()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (8 * ROWS, SEQ), generator=generator)
    alone = ilm_compile.parallelize(model, num_microbatches=8, example_inputs=INPUTS)
    assert loss == pytest.approx(
        float(alone.execute_schedule({"input_ids": ids, "labels": ids})), rel=1e-5
    )

"""Expert parallelism in real processes: float64, loss and every gradient, unequal targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ilm_compile
from ilm_compile.runtime import adamw
from ilm_compile.runtime.checkpoint import CheckpointManager
from tests.support.axes import case, each_once
from tests.support.equality import EXAMPLE, Case, assert_prepared_equal, make_batch, make_model
from tests.support.promote import promoted_float32
from tests.support.tiny_model import TinyTransformer
from tests.support.traced import traced_once
from tests.support.training import train_and_compare
from tests.support.world import World
from tests.support.zoo import EXPERTS_LISTED

BOUND = 1e-10
SLOW = {"Jamba", "dots.llm1", "ERNIE-4.5-MoE", "Qwen2-MoE"}  # alike to others, or large
MODELS = ("experts", "Mixtral", *[name for name in EXPERTS_LISTED if name not in SLOW])
# Beside ep=2 and more, over two and four processes.
PLANS = {
    2: [{"ep": 2, "num_microbatches": 3}],
    4: [
        {"ep": 4},
        {"ep": 2, "num_microbatches": 2},
        {"ep": 2, "zero": 3, "num_microbatches": 2},
        {"ep": 2, "tp": 2},
        {"ep": 2, "cp": 2, "num_microbatches": 2},
        {"ep": 2, "pp": 2, "num_microbatches": 3, "checkpoint": 0.5},
    ],
}
# Of InternEvo's: their routers' loss is of a micro-batch, so there is one.
OWN = {
    2: [("INTERNLM_MoE", {"ep": 2}), ("INTERNLM_MoE", {"tp": 2}), ("QWEN3MOE", {"cp": 2})],
    4: [
        ("INTERNLM_MoE", {"ep": 2, "tp": 2}),
        ("QWEN3MOE", {"ep": 2, "pp": 2, "num_microbatches": 1, "schedule": "zb_h1"}),
    ],
}
TRAINED = [{"ep": 2}, {"ep": 2, "zero": 3}, {"ep": 2, "tp": 2}, {"ep": 2, "pp": 2}]


# Each model once over two processes, each plan once over four; many models under every plan:
# python -m benchmarks.axes_equality
TWO = [*each_once(MODELS, PLANS[2] * len(MODELS), 2), *(Case(*own) for own in OWN[2])]
FOUR = [*each_once(MODELS, PLANS[4], 4), *(Case(*own) for own in OWN[4])]


def ranks(plan):
    return plan.get("ep", 1) * plan.get("cp", 1) * plan.get("tp", 1) * plan.get("pp", 1)


@pytest.mark.parametrize("case", TWO, ids=str)
def test_two_processes_equal_the_single_device_model(case, prepared):
    assert_prepared_equal(prepared, 2, case, BOUND)


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_four_processes_equal_the_single_device_model(case, prepared):
    assert_prepared_equal(prepared, 4, case, BOUND)


def test_eight_processes_on_three_axes_equal_the_single_device_model(prepared):
    assert_prepared_equal(prepared, 8, case("Mixtral", "ep", (2, 2, 2, 1)), BOUND)


@pytest.mark.parametrize("plan", TRAINED, ids=str)
def test_ten_adamw_steps_end_in_the_same_weights(plan, world4):
    trained = world4.run(train_and_compare, Case("experts", plan, 4 // ranks(plan)), 10)[0]
    assert trained.weights <= 1e-8


@pytest.mark.parametrize("plan", [{"ep": 2, "num_microbatches": 2}, {"ep": 2, "cp": 2, "tp": 2}])
def test_the_proof_has_an_axis_of_experts(plan):
    report = ilm_compile.verify(make_model("experts"), example_inputs=EXAMPLE, dp=2, **plan)
    assert report.ok, str(report)


@pytest.mark.parametrize("name", ["Mixtral", "GPT-OSS"])
def test_the_experts_of_a_hugging_face_model_are_divided(name):
    program = ilm_compile.partition(make_model(name), example_inputs=EXAMPLE, ep=2)
    weights = [v for v in program.variables.values() if v.name.endswith("_proj")]
    assert {v.layout.text(["ep"]) for v in weights if len(v.shape) == 3} == {"S(0)"}


def first_seen(rank: int, plan: dict[str, Any]) -> dict[str, Tensor]:
    """Weights, of experts on meta, logits, and gradients after hooks, as rank 0 has them.

    The hook scales each expert's gradient by another number, so it must see all of them in order.
    """
    torch.manual_seed(0)
    model = TinyTransformer(experts=True).double()
    model.experts.to("meta")
    scales = torch.arange(1.0, 1 + len(model.experts.up), dtype=torch.float64).view(-1, 1, 1)
    model.experts.up.register_hook(lambda gradient: gradient * scales)
    with promoted_float32():
        parallel = ilm_compile.parallelize(model, example_inputs=model.example_inputs(), **plan)
        tokens = torch.arange(4 * 8).view(4, 8) * 7 % 32
        batch = {"input_ids": tokens, "labels": tokens.flip(1)}
        logits, _, _ = parallel.execute_schedule(batch, return_output_label=True)
    gradients = {f"gradient of {n}": g for n, g in parallel.full_gradients().items()}
    return {"logits": logits, **parallel.full_state_dict(), **gradients}


@pytest.mark.parametrize("plan", [{"ep": 2, "num_microbatches": 2}], ids=str)
def test_weights_outputs_and_hooked_gradients_do_not_depend_on_ep(plan, world2):
    expected = first_seen(0, {"num_microbatches": 2})
    found = world2.run(first_seen, plan)[0]
    assert found.keys() == expected.keys()
    assert "gradient of experts.up" in found
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=name)


# One training, each leg of it under another plan, from what the leg before has saved.
LEGS: list[tuple[int, dict[str, Any]]] = [
    (4, {"ep": 2, "zero": 3}),
    (4, {"ep": 4}),
    (1, {}),
    (4, {"ep": 2, "pp": 2}),
    (2, {"tp": 2}),
    (4, {"ep": 2, "tp": 2}),
    (4, {"ep": 2, "cp": 2}),
]
LEG = 2  # steps
ROWS = 4


def train_leg(rank: int, folder: str, plan: dict[str, Any], size: int, num_steps: int):
    """Loss and gradient norm of the next steps from what is in `folder`, saved there."""
    dp = size // ranks({"ep": 1, **plan})
    with promoted_float32(), traced_once("experts"):
        parallel = ilm_compile.parallelize(
            make_model("experts"), example_inputs=EXAMPLE, num_microbatches=ROWS // 2 // dp, **plan
        )
        optimizer = adamw(parallel.named_parameters(), lr=0.01)
        manager = CheckpointManager(folder, parallel, optimizer=optimizer)
        start = manager.resume() or 0
        found = []
        for step in range(start, start + num_steps):
            parallel.zero_grad()
            batch = make_batch(ROWS)
            batch["input_ids"] = (batch["input_ids"] + step) % 512
            loss = parallel.execute_schedule(batch)
            assert isinstance(loss, Tensor)
            found += [loss.item(), parallel.clip_grad_norm_(1.0).item()]
            optimizer.step()
        manager.save(start + num_steps, wait=True)
        manager.close()
    return found


def test_a_training_goes_on_over_other_numbers_of_ranks_that_divide_the_experts(
    world2: World, world4: World, tmp_path: Path
) -> None:
    worlds = {2: world2, 4: world4}
    through = train_leg(0, f"{tmp_path}/through", {}, 1, LEG * len(LEGS))
    legs: list[float] = []
    for size, plan in LEGS:
        leg = (f"{tmp_path}/legs", plan, size, LEG)
        results = worlds[size].run(train_leg, *leg) if size > 1 else [train_leg(0, *leg)]
        assert all(each == results[0] for each in results)
        legs += results[0]
    assert legs == pytest.approx(through, rel=1e-9)
    assert len({round(number, 6) for number in legs}) == len(legs)

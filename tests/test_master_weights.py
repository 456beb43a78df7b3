"""Models in bf16 and fp16 are trained as a plain loop with float32 master weights trains them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ilm_compile
from examples.custom_pass import MergeGateUp
from ilm_compile.runtime.checkpoint import CheckpointManager
from ilm_compile.runtime.optimizer import adamw
from tests.support.world import World

VOCAB, STEPS = 64, 10
ROWS = 8  # of a global batch
NAME = "master-weights"


class Model(nn.Module):
    """Tied ends, a norm, and a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.blocks[1].bias.requires_grad_(False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def make_model(dtype: torch.dtype = torch.bfloat16) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def make_batch(step: int) -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (ROWS, 8), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def optimizer_of(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "adamw":
        return adamw(parameters, lr=1e-5)
    return torch.optim.SGD([p for _, p in parameters if p.requires_grad], lr=1e-3)


def plain_loop(optimizer: str, num_slices: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The master weights after the steps, by PyTorch alone."""
    model = make_model(dtype)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    masters = {n: nn.Parameter(p.detach().float()) for n, p in trained.items()}
    steps = optimizer_of(optimizer, masters.items())
    for step in range(STEPS):
        for master in masters.values():
            master.grad = torch.zeros_like(master)
        columns = [tensor.chunk(num_slices) for tensor in make_batch(step).values()]
        for ids, labels in zip(*columns, strict=True):
            (model(ids, labels) / num_slices).backward()
            for name, parameter in trained.items():
                masters[name].grad += parameter.grad.float()
                parameter.grad = None
        steps.step()
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(masters[name])
    return {name: master.detach() for name, master in masters.items()}


def make_parallel(dtype: torch.dtype = torch.bfloat16, **plan: Any) -> ilm_compile.Parallel:
    rows = plan.pop("rows")
    spec = {name: ((rows, 8), torch.int64) for name in ("input_ids", "labels")}
    return ilm_compile.parallelize(make_model(dtype), example_inputs=spec, **plan)


def train(
    rank: int,
    optimizer: str,
    dtype: torch.dtype,
    plan: dict[str, Any],
    folder: str | None = None,
    first: int = 0,
    last: int = STEPS,
) -> dict[str, Tensor]:
    """The state after the steps `first` to `last`, continued from and saved to `folder`."""
    parallel = make_parallel(dtype, **plan)
    trainer = ilm_compile.Trainer(
        parallel,
        optimizer=optimizer_of(optimizer, list(parallel.named_parameters())),
        max_grad_norm=None,
    )
    parts = {"optimizer": trainer.optimizer, "states": {"trainer": trainer}}
    manager = CheckpointManager(folder, parallel, **parts) if folder else None
    if manager is not None and first:
        manager.load(first)
    for step in range(first, last):
        trainer.zero_grad()
        trainer.execute_schedule(make_batch(step))
        trainer.step()
    if manager is not None:
        manager.save(last, wait=True)
    return parallel.full_state_dict()


def update_error(
    trained: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype
) -> float:
    """The largest difference of a weight's whole update, relative to that update."""
    initial = dict(make_model(dtype).named_parameters())
    errors = []
    for name, master in expected.items():
        if name not in initial or not initial[name].requires_grad:
            continue
        update = master - initial[name].detach().float()
        errors.append(float((trained[name] - master).norm() / update.norm()))
    return max(errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_process_trains_as_the_plain_loop(optimizer: str, dtype: torch.dtype) -> None:
    trained = train(0, optimizer, dtype, {"rows": 4, "num_microbatches": 2})
    expected = plain_loop(optimizer, 2, dtype)
    initial = make_model(dtype).state_dict()
    assert update_error(trained, expected, dtype) < 0.02
    for name in expected:
        assert trained[name].dtype == torch.float32
        moved = (trained[name] != initial[name].float()).float().mean()
        assert moved > 0.99, f"{name}: {moved:.1%} of the weights moved"
    assert trained["blocks.1.bias"].dtype == dtype
    assert torch.equal(trained["blocks.1.bias"], initial["blocks.1.bias"])


PLANS = {
    "pp": {"pp": 2, "rows": 2, "num_microbatches": 4},
    "tp": {"tp": 2, "rows": 4, "num_microbatches": 2},
    "zero1": {"zero": 1, "rows": 2, "num_microbatches": 2},
    "zero3": {"zero": 3, "rows": 2, "num_microbatches": 2},
    "recompute": {"pp": 2, "rows": 4, "num_microbatches": 2, "checkpoint": True},
}


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_trains_as_the_plain_loop(world2: World, plan: str) -> None:
    trained = world2.run(train, "sgd", torch.bfloat16, PLANS[plan])[0]
    expected = plain_loop("sgd", ROWS // PLANS[plan]["rows"], torch.bfloat16)
    assert update_error(trained, expected, torch.bfloat16) < 0.02


def test_a_run_goes_on_under_another_plan(world2: World, tmp_path: Path) -> None:
    options = ("adamw", torch.bfloat16)
    world2.run(train, *options, PLANS["zero3"], str(tmp_path), 0, STEPS // 2)
    one = {"rows": 2, "num_microbatches": 4}
    resumed = train(0, *options, one, str(tmp_path), STEPS // 2)
    assert update_error(resumed, train(0, *options, one), torch.bfloat16) < 1e-3


def partition(model: nn.Module, **keywords: Any) -> ilm_compile.Program:
    spec = {name: ((2, 8), torch.int64) for name in ("input_ids", "labels")}
    return ilm_compile.partition(model, example_inputs=spec, **keywords)


def test_the_table_is_looked_up_before_it_is_rounded() -> None:
    program = partition(make_model())
    (lookup,) = program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.embedding.default
    )
    assert lookup.meta["val"].dtype == torch.float32
    assert [user.meta["val"].dtype for user in lookup.users] == [torch.bfloat16]


def test_what_is_held_in_float32_is_said() -> None:
    said = partition(make_model()).explain()
    assert f"- {NAME}: 10 parameters in bfloat16 are held, updated and saved in float32" in said
    assert NAME not in partition(Model()).explain()


def test_the_numbers_stay_what_they_are() -> None:
    partition(make_model(), validate="numerics")


def test_it_can_be_left_out() -> None:
    program = partition(make_model(), disable={NAME})
    assert {v.dtype for v in program.parameters().values()} == {torch.bfloat16}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (F.silu(self.gate(x)) * self.up(x)).float().sum()


def test_weights_that_a_pass_merges_are_saved_in_float32() -> None:
    torch.manual_seed(0)
    model = Gated().bfloat16()
    parallel = ilm_compile.parallelize(
        model, example_inputs={"x": ((2, 8), torch.bfloat16)}, passes=[MergeGateUp()]
    )
    assert [name for name, _ in parallel.named_parameters()] == ["gate.weight_and_up"]
    saved = parallel.full_state_dict()
    for name, value in saved.items():
        assert torch.equal(value, model.state_dict()[name].float())
    parallel.load_state_dict(saved)  # which refuses tensors of another dtype than it saves


@pytest.mark.parametrize("plan", [{"tp": 2, "pp": 2, "dp": 2}, {"tp": 2, "dtype": "bfloat16"}])
def test_master_weights_are_part_of_the_proof(plan: dict[str, Any]) -> None:
    inputs = {name: ((2, 8), torch.int64) for name in ("input_ids", "labels")}
    report = ilm_compile.verify(make_model(), example_inputs=inputs, num_microbatches=2, **plan)
    report.raise_if_failed()
    assert f"{5 + ('dtype' in plan)} passes" in report.checks[0].detail

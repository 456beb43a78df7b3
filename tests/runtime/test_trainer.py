"""The training loop: the same weights as on one device, skipped steps, metrics, and refusals."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Mesh, Parallel, StepMetrics, Trainer, adamw
from ilm_compile.schedule import Action, Schedule
from tests.runtime.handmade import (
    ROWS,
    SEQ,
    lower_by_hand,
    make_batch,
    make_model,
    make_parallel,
)
from tests.support.world import World

LR, MAX_NORM, NUM_STEPS = 1e-2, 0.05, 10


def halving(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def train_alone(rows: int, *, tied: bool) -> dict[str, Tensor]:
    """Ten steps of an ordinary loop with torch's own clipping."""
    model = make_model(tied=tied)
    trained = [(n, p) for n, p in model.named_parameters() if n not in ("frozen", "unused")]
    optimizer = adamw(trained, lr=LR)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        model(**make_batch(rows, seed=step)).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], MAX_NORM)
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def train_in_parallel(rank: int, plan: Plan, tied: bool) -> dict[str, Tensor]:
    parallel = make_parallel(plan, make_model(tied=tied), tied=tied)
    trainer = Trainer(parallel, lr=LR, max_grad_norm=MAX_NORM)
    for step in range(NUM_STEPS):
        trainer.zero_grad()
        batch = make_batch(ROWS * plan.num_microbatches * parallel.mesh.dp.size, seed=step)
        # An evaluation between two steps must leave no trace.
        trainer.execute_schedule(batch, forward_only=True)
        trainer.execute_schedule(batch, return_loss=False)
        trainer.step()
    return parallel.full_state_dict()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(tp=2, pp=2, num_microbatches=3),
        Plan(pp=4, num_microbatches=4),
        Plan(pp=2, num_microbatches=2, zero=1),
        Plan(tp=2, num_microbatches=2, zero=3),
        Plan(pp=2, num_microbatches=2, num_chunks=2, schedule="interleaved_1f1b", zero=3),
    ],
    ids=["tp2-pp2", "pp4", "pp2-dp2-zero1", "tp2-dp2-zero3", "pp2-chunks2-dp2-zero3"],
)
def test_ten_steps_end_in_the_same_weights(world4: World, plan: Plan, tied: bool) -> None:
    state = world4.run(train_in_parallel, plan, tied)[0]
    rows = ROWS * plan.num_microbatches * (4 // (plan.tp * plan.pp))
    for name, expected in train_alone(rows, tied=tied).items():
        torch.testing.assert_close(state[name], expected, rtol=1e-8, atol=1e-12, msg=name)


def test_two_copies_of_a_tied_parameter_on_one_rank_stay_equal() -> None:
    """Both stages on one rank: an optimizer sees the parameter once, and both stages follow."""
    rows = [[Action.parse(text) for text in "0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1".split()]]
    schedule = Schedule.from_rows("both", rows)
    lowered = lower_by_hand(Plan(pp=2, num_microbatches=2), tied=True)
    parallel = Parallel(lowered, schedule, Mesh.create(Plan()), make_model(tied=True))
    assert [name for name, _ in parallel.named_parameters()].count("embed") == 1
    trainer = Trainer(parallel, lr=LR, max_grad_norm=MAX_NORM)
    for step in range(NUM_STEPS):
        trainer.zero_grad()
        trainer.execute_schedule(make_batch(2 * ROWS, seed=step))
        trainer.step()
    expected = train_alone(2 * ROWS, tied=True)
    for name, value in parallel.full_state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-12, msg=name)


def train_with_torch_optimizer(rank: int) -> float:
    """An optimizer that knows nothing of us, on the DTensors, with its own zero_grad."""
    plan = Plan(tp=2, pp=2, num_microbatches=2)
    parallel = make_parallel(plan, make_model())
    optimizer = torch.optim.AdamW([p for _, p in parallel.named_parameters()], lr=LR)
    batch = make_batch(2 * ROWS)
    for _ in range(3):
        optimizer.zero_grad()
        loss = parallel.execute_schedule(batch)
        optimizer.step()
    return loss.item()


def test_any_torch_optimizer_works_on_the_named_parameters(world4: World) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**make_batch(2 * ROWS))
        loss.backward()
        optimizer.step()
    assert world4.run(train_with_torch_optimizer) == pytest.approx([loss.item()] * 4, rel=1e-10)


def step_on_infinity(rank: int) -> tuple[float, int, float, bool]:
    """The gradient of one parameter of one rank overflows."""
    parallel = make_parallel(Plan(pp=4, num_microbatches=2), make_model())
    trainer = Trainer(parallel, lr=LR, lr_scheduler=halving)
    before = [p.to_local().detach().clone() for _, p in parallel.named_parameters()]
    trainer.execute_schedule(make_batch(2 * ROWS))
    if rank == 1:
        grads = [p.grad for _, p in parallel.named_parameters() if p.grad is not None]
        grads[0].fill_(torch.inf)
    norm = trainer.step()
    after = [p.to_local().detach() for _, p in parallel.named_parameters()]
    unchanged = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return norm, trainer.num_skipped_steps, trainer.optimizer.param_groups[0]["lr"], unchanged


def test_a_norm_that_is_not_finite_skips_the_step_on_all_ranks(world4: World) -> None:
    for norm, skipped, lr, unchanged in world4.run(step_on_infinity):
        assert not math.isfinite(norm)
        assert (skipped, lr, unchanged) == (1, LR, True)


def fit(path: Path | None, num_steps: int, num_batches: int) -> list[StepMetrics]:
    parallel = make_parallel(Plan(num_microbatches=2), make_model(), model_flops=1000.0)
    trainer = Trainer(parallel, lr=LR, lr_scheduler=halving)
    batches = [make_batch(2 * ROWS, seed=step) for step in range(num_batches)]
    seen: list[StepMetrics] = []
    history = trainer.fit(
        batches, num_steps, metrics_path=path, progress=False, callback=seen.append
    )
    assert seen == history
    return history


def test_fit_writes_a_line_of_metrics_per_step(tmp_path: Path) -> None:
    history = fit(tmp_path / "metrics.jsonl", 3, 5)
    lines = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["lr"] for line in lines] == [LR, LR / 2, LR / 4]
    assert [line["loss"] for line in lines] == [metrics.loss for metrics in history]
    for line in lines:
        assert line["num_tokens"] == 2 * ROWS * SEQ
        flops = line["model_flops_per_second"] * line["step_time_s"]
        assert flops == pytest.approx(2 * 1000.0)


def test_fit_keeps_the_metrics_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run may have millions."""
    monkeypatch.setattr("ilm_compile.runtime.trainer.MAX_HISTORY", 2)
    trainer = Trainer(make_parallel(Plan(), make_model()))
    history = trainer.fit([make_batch(ROWS)] * 5, 5, progress=False)
    assert [metrics.step for metrics in history] == [4, 5]


def test_fit_refuses_too_few_batches() -> None:
    with pytest.raises(IlmCompileError, match="expected 3 batches, got 2"):
        fit(None, 3, 2)


def test_a_max_grad_norm_of_zero_is_refused() -> None:
    parallel = make_parallel(Plan(), make_model())
    with pytest.raises(IlmCompileError, match="max_grad_norm must be above 0, got 0"):
        Trainer(parallel, max_grad_norm=0)

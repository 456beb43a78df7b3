"""What is not finite on one rank skips the step on every rank; loss scales; giving up."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import Beta2Scheduler, LossScaler, Parallel, Trainer
from tests.runtime.handmade import ROWS, make_batch, make_model, make_parallel
from tests.support.world import World

LR = 1e-2
TP2 = Plan(tp=2, num_microbatches=2)
PP2 = Plan(pp=2, num_microbatches=2)
DP2 = Plan(num_microbatches=2, zero=1)


def halving(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5**step)


def values(parallel: Parallel) -> list[Tensor]:
    return [_local(parameter).detach().clone() for _, parameter in parallel.named_parameters()]


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def plant_gradient(parallel: Parallel, value: float) -> None:
    """In one element of the last norm: equal on both tp ranks, of which only rank 0's counts."""
    norms = [p for name, p in parallel.named_parameters() if name.endswith("norm")]
    _local(norms[-1].grad).view(-1)[:1].fill_(value)


def plant_loss(parallel: Parallel) -> None:
    """Add infinity to the loss of every micro-batch, which leaves the gradients finite."""

    def add(module: Any, args: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return outputs[0] + torch.inf, *outputs[1:]

    if parallel.stages[-1].outputs:
        parallel.stages[-1].module.register_forward_hook(add)


def step_with(rank: int, plan: Plan, what: str) -> tuple[Any, ...]:
    """One good step, then one in which rank 1 has something that is not finite."""
    parallel = make_parallel(plan, make_model())
    trainer = Trainer(
        parallel,
        lr=LR,
        lr_scheduler=halving,
        beta2_scheduler=lambda adam: Beta2Scheduler(adam, init_beta2=0.5, c=0.8),
    )
    batch = make_batch(ROWS * plan.num_microbatches * parallel.mesh.dp.size)
    trainer.execute_schedule(batch)
    good = trainer.step()
    if what == "loss" and rank == 1:
        plant_loss(parallel)
    before = values(parallel)
    settings = [dict(group, params=None) for group in trainer.optimizer.param_groups]
    trainer.zero_grad()
    trainer.execute_schedule(batch, return_loss=False)
    grads = [_local(p.grad).sum() for _, p in parallel.named_parameters() if p.grad is not None]
    had_finite_grads = bool(torch.stack(grads).isfinite().all())
    if what != "loss" and rank == 1:
        plant_gradient(parallel, float(what))
    norm = trainer.step()
    is_unchanged = all(torch.equal(*pair) for pair in zip(before, values(parallel), strict=True))
    settings_after = [dict(group, params=None) for group in trainer.optimizer.param_groups]
    counts = trainer.num_steps, trainer.num_skipped_steps
    return good, norm, had_finite_grads, is_unchanged and settings == settings_after, counts


@pytest.mark.parametrize("what", ["nan", "inf", "loss"])
@pytest.mark.parametrize("plan", [TP2, PP2, DP2], ids=["tp2", "pp2", "dp2"])
def test_what_is_not_finite_on_one_rank_skips_the_step_on_both(
    world2: World, plan: Plan, what: str
) -> None:
    for good, norm, had_finite_grads, is_unchanged, counts in world2.run(step_with, plan, what):
        assert math.isfinite(good)
        assert not math.isfinite(norm)
        assert had_finite_grads  # nothing but what was planted is wrong
        assert is_unchanged
        assert counts == (2, 1)


def train(scaler: LossScaler | None, max_grad_norm: float | None) -> tuple[list[float], Parallel]:
    parallel = make_parallel(Plan(num_microbatches=2), make_model())
    trainer = Trainer(parallel, lr=LR, scaler=scaler, max_grad_norm=max_grad_norm)
    norms = []
    for seed in range(3):
        trainer.zero_grad()
        trainer.execute_schedule(make_batch(2 * ROWS, seed=seed))
        norms.append(trainer.step())
    return norms, parallel


@pytest.mark.parametrize("max_grad_norm", [None, 0.05], ids=["unclipped", "clipped"])
def test_a_loss_scale_changes_nothing_that_does_not_overflow(max_grad_norm: float | None) -> None:
    norms, plain = train(None, max_grad_norm)
    scaled_norms, scaled = train(LossScaler(), max_grad_norm)
    assert scaled_norms == pytest.approx(norms, rel=1e-12)
    for expected, value in zip(values(plain), values(scaled), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def test_gradients_carry_the_scale_until_the_step() -> None:
    parallel = make_parallel(Plan(num_microbatches=2), make_model())
    trainer = Trainer(parallel, scaler=LossScaler(initial_scale=1024.0))
    loss = trainer.execute_schedule(make_batch(2 * ROWS))
    plain = make_parallel(Plan(num_microbatches=2), make_model())
    assert torch.equal(loss, plain.execute_schedule(make_batch(2 * ROWS)))
    ratio = parallel.grad_norm() / plain.grad_norm()
    assert ratio.item() == pytest.approx(1024, rel=1e-12)


def test_an_overflow_lowers_the_scale_and_skips() -> None:
    parallel = make_parallel(Plan(num_microbatches=2), make_model())
    trainer = Trainer(parallel, scaler=LossScaler(hysteresis=1))
    before = values(parallel)
    trainer.execute_schedule(make_batch(2 * ROWS))
    plant_gradient(parallel, torch.inf)
    trainer.step()
    assert trainer.scaler.scale == 2**15
    assert trainer.num_skipped_steps == 1
    assert all(torch.equal(*pair) for pair in zip(before, values(parallel), strict=True))


def test_a_good_step_after_a_bad_one_is_taken() -> None:
    """The loss that was not finite is forgotten with its gradients, by any zero_grad.

    So is the bad step: only those in a row count towards `max_skips`.
    """
    parallel = make_parallel(Plan(num_microbatches=2), make_model())
    trainer = Trainer(parallel, max_skips=2)
    for is_bad in (True, False, True):
        if is_bad:
            plant_loss(parallel)
        trainer.optimizer.zero_grad()
        trainer.execute_schedule(make_batch(2 * ROWS))
        assert math.isfinite(trainer.step()) is not is_bad
        parallel.stages[-1].module._forward_hooks.clear()


def bad_forever(rank: int) -> str:
    parallel = make_parallel(TP2, make_model())
    if rank == 1:
        plant_loss(parallel)
    trainer = Trainer(parallel, max_skips=3)
    with pytest.raises(IlmCompileError) as error:
        trainer.fit([make_batch(2 * ROWS)] * 9, 9, progress=False)
    return f"{trainer.num_steps} {error.value}"


def test_too_many_bad_steps_in_a_row_are_an_error_on_every_rank(world2: World) -> None:
    for text in world2.run(bad_forever):
        assert text.startswith("3 Trainer: expected a finite loss and finite gradients")
        assert "in 3 steps in a row, step 3 the last" in text


def test_a_max_skips_of_zero_is_refused() -> None:
    with pytest.raises(IlmCompileError, match="max_skips must be 1 or above, got 0"):
        Trainer(make_parallel(Plan(), make_model()), max_skips=0)

"""Which parameters decay, what AdamW computes, and the learning rate over the steps."""

import math

import pytest
import torch
from torch import nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.optimizer import adamw, lr_schedule


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4)).double()


def rates(steps: int, **options: float) -> list[float]:
    """The learning rate that each step uses, relative to the full one."""
    optimizer = adamw(model().named_parameters(), lr=2.0)
    schedule = lr_schedule(optimizer, **options)  # type: ignore[arg-type]
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    return seen


def test_matrices_decay_and_vectors_do_not() -> None:
    layers = model()
    decayed, kept = adamw(layers.named_parameters(), lr=1e-3, weight_decay=0.2).param_groups
    assert [p.ndim for p in decayed["params"]] == [2, 2]
    assert [p.ndim for p in kept["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.2, 0.0)


def test_vectors_decay_too_if_asked() -> None:
    groups = adamw(model().named_parameters(), lr=1e-3, weight_decay=0.2, decay_all=True)
    assert [group["weight_decay"] for group in groups.param_groups] == [0.2, 0.2]


def test_frozen_parameters_are_left_out() -> None:
    layers = model()
    layers[0].requires_grad_(False)
    decayed, _ = adamw(layers.named_parameters(), lr=1e-3).param_groups
    assert len(decayed["params"]) == 1


@pytest.mark.parametrize("ndim", [1, 2])
def test_a_stage_with_one_kind_of_parameter_has_both_groups(ndim: int) -> None:
    parameter = nn.Parameter(torch.ones([2] * ndim))
    groups = adamw([("weight", parameter)], lr=1e-3).param_groups
    assert [len(group["params"]) for group in groups] == [int(ndim == 2), int(ndim == 1)]


@pytest.mark.parametrize(("ndim", "decay"), [(1, 0.0), (2, 0.3)], ids=["vector", "matrix"])
def test_one_step_follows_the_formula(ndim: int, decay: float) -> None:
    parameter = nn.Parameter(torch.full([2] * ndim, 5.0, dtype=torch.float64))
    optimizer = adamw([("weight", parameter)], lr=0.1, eps=1e-3, weight_decay=0.3)
    parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    # first step: the bias corrections cancel the betas, so the update is g / (|g| + eps)
    expected = torch.full_like(parameter, 5.0 * (1 - 0.1 * decay) - 0.1 * 2.0 / (2.0 + 1e-3))
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": math.nan}, "lr must be above 0, got nan"),
        ({"lr": 1e-3, "betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"lr": 1e-3, "eps": 0.0}, "eps must be above 0, got 0.0"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay must be 0 or above, got -0.1"),
    ],
    ids=["lr-zero", "lr-nan", "betas", "eps", "weight-decay"],
)
def test_adamw_refuses_bad_values(options: dict, message: str) -> None:
    with pytest.raises(IlmCompileError, match=f"adamw: {message}"):
        adamw(model().named_parameters(), **options)


def test_adamw_of_a_rank_that_trains_nothing_does_nothing() -> None:
    layers = model().requires_grad_(False)
    optimizer = adamw(layers.named_parameters(), lr=1e-3)
    optimizer.step()
    assert [group["params"] for group in optimizer.param_groups] == [[], []]


def test_adamw_is_that_of_language_models_unless_told() -> None:
    optimizer = adamw(model().named_parameters(), lr=1e-3)
    decay, plain = optimizer.param_groups
    assert decay["betas"] == plain["betas"] == (0.9, 0.95)
    assert decay["eps"] == plain["eps"] == 1e-8
    assert (decay["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_rate_warms_up_linearly_then_falls_to_the_minimum_at_the_last_step() -> None:
    seen = rates(10, warmup_steps=4, total_steps=10, min_ratio=0.2)
    assert seen[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0], rel=1e-10)
    assert seen[6] == pytest.approx(0.6, rel=1e-10)
    assert seen[9] == pytest.approx(0.2, rel=1e-10)
    assert seen[3:] == sorted(seen[3:], reverse=True)


def test_a_held_peak_puts_the_cosine_a_step_later() -> None:
    """Against the recursion that torch's CosineAnnealingLR follows, which InternEvo wraps."""
    layers = model()
    oracle = adamw(layers.named_parameters(), lr=2.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(oracle, T_max=4, eta_min=0.2)
    expected = [0.5, 1.0]  # warm-up
    for _ in range(4):
        expected.append(oracle.param_groups[0]["lr"] / 2.0)
        oracle.step()
        cosine.step()
    found = rates(6, warmup_steps=2, total_steps=6, min_ratio=0.1, hold_peak=True)
    assert found == pytest.approx(expected)


def test_rate_is_zero_for_the_initial_steps_and_warms_up_after_them() -> None:
    seen = rates(8, init_steps=2, warmup_steps=4, total_steps=10)
    assert seen[:6] == pytest.approx([0, 0, 0.25, 0.5, 0.75, 1.0], rel=1e-10)
    assert seen[6] < 1


def test_the_fused_kernel_is_taken_unless_refused() -> None:
    layers = model()
    assert adamw(layers.named_parameters(), lr=1e-3).defaults["fused"] is True
    assert adamw(layers.named_parameters(), lr=1e-3, fused=False).defaults["fused"] is False


def test_rate_stays_at_the_minimum_after_the_last_step() -> None:
    assert rates(6, warmup_steps=0, total_steps=3, min_ratio=0.5)[2:] == pytest.approx([0.5] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 5, "total_steps": 5}, "got warmup_steps=5, total_steps=5"),
        ({"warmup_steps": -1, "total_steps": 5}, "got warmup_steps=-1, total_steps=5"),
        ({"warmup_steps": 3, "total_steps": 5, "init_steps": 2}, "total_steps=5, init_steps=2"),
        ({"warmup_steps": 1, "total_steps": 5, "min_ratio": 1.5}, "min_ratio must lie in"),
    ],
    ids=["warmup-too-long", "warmup-negative", "init-too-long", "min-ratio"],
)
def test_schedule_refuses_bad_values(options: dict, message: str) -> None:
    with pytest.raises(IlmCompileError, match=message):
        rates(1, **options)

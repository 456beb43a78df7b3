"""The loss scale of float16 over the steps, and Adam's second beta over the steps."""

from typing import Any

import pytest
import torch
from torch import nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime import Beta2Scheduler, LossScaler, adamw


def scales(overflows: str, **options: Any) -> list[float]:
    """The scale after each step; overflows: one character a step, "x" for an overflow."""
    scaler = LossScaler(**{"initial_scale": 16.0, **options})
    seen = []
    for character in overflows:
        scaler.update(overflowed=character == "x")
        seen.append(scaler.scale)
    return seen


def optimizer() -> torch.optim.AdamW:
    return adamw([("w", nn.Parameter(torch.ones(2, 2)))], lr=1e-3, betas=(0.9, 0.95))


def test_scale_grows_after_a_whole_interval_without_overflow() -> None:
    assert scales("..x...", growth_interval=3, hysteresis=9)[-1] == 32
    assert scales("..x..", growth_interval=3, hysteresis=9)[-1] == 16


def test_scale_shrinks_once_hysteresis_is_used_up_and_at_every_overflow_then() -> None:
    assert scales("xxx", hysteresis=2) == [16, 8, 4]
    assert scales("x.x.x", hysteresis=2) == [16, 16, 8, 8, 4]


def test_growing_gives_the_hysteresis_back() -> None:
    assert scales("xx.x", hysteresis=2, growth_interval=1) == [16, 8, 16, 16]


def test_scale_stays_between_its_limits() -> None:
    assert scales("xxxx", hysteresis=1, min_scale=4.0) == [8, 4, 4, 4]
    assert scales("....", growth_interval=1, max_scale=32.0) == [32, 32, 32, 32]


def test_factors_are_those_given() -> None:
    assert scales("x.", hysteresis=1, backoff_factor=0.25) == [4, 4]
    assert scales(".", growth_interval=1, growth_factor=4.0) == [64]


def test_a_scaler_goes_on_where_its_state_was_taken() -> None:
    """Counters too: one more good step grows the scale, one more overflow shrinks it."""
    options: dict[str, Any] = {"initial_scale": 16.0, "growth_interval": 3, "hysteresis": 2}
    first = LossScaler(**options)
    for overflowed in (True, False, False):
        first.update(overflowed=overflowed)
    for overflowed, expected in ((False, 32), (True, 8)):
        second = LossScaler(**options)
        second.load_state_dict(first.state_dict())
        second.update(overflowed=overflowed)
        assert second.scale == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_scale": 0.5}, "0 < min_scale <= initial_scale <= max_scale"),
        ({"max_scale": float("inf"), "initial_scale": float("inf")}, "got .*inf"),
        ({"growth_interval": 0}, "growth_interval must be 1 or above, got 0"),
        ({"growth_factor": 1.0}, "growth_factor must be above 1, got 1.0"),
        ({"backoff_factor": 1.0}, r"backoff_factor must lie in \(0, 1\), got 1.0"),
        ({"hysteresis": 0}, "hysteresis must be 1 or above, got 0"),
    ],
)
def test_scaler_refuses_what_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(IlmCompileError, match=f"grad_scaler: .*{message}"):
        LossScaler(**options)


def test_beta2_follows_the_formula_and_leaves_beta1_alone() -> None:
    adam = optimizer()
    scheduler = Beta2Scheduler(adam, init_beta2=0.9, c=0.8)
    seen = []
    for _ in range(100):
        seen.append(adam.param_groups[1]["betas"])
        scheduler.step()
    assert {beta1 for beta1, _ in seen} == {0.9}
    betas = [beta2 for _, beta2 in seen]
    assert betas[:2] == [0.9, 0.9]
    assert betas[99] == pytest.approx(1 - 99**-0.8, rel=1e-12)
    assert betas == sorted(betas)


def test_beta2_is_constant_for_c_of_zero() -> None:
    adam = optimizer()
    scheduler = Beta2Scheduler(adam, init_beta2=0.95)
    for _ in range(5):
        scheduler.step()
    assert adam.param_groups[0]["betas"] == (0.9, 0.95)


def test_beta2_goes_on_where_its_state_was_taken() -> None:
    first = Beta2Scheduler(optimizer(), init_beta2=0.5, c=0.8)
    for _ in range(7):
        first.step()
    adam = optimizer()
    second = Beta2Scheduler(adam, init_beta2=0.5, c=0.8)
    second.load_state_dict(first.state_dict())
    assert adam.param_groups[0]["betas"][1] == first.beta2 == pytest.approx(1 - 7**-0.8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_beta2": 1.0}, r"init_beta2 must lie in \[0, 1\), got 1.0"),
        ({"init_beta2": 0.9, "c": -1.0}, "c must be 0 or above, got -1.0"),
    ],
)
def test_beta2_refuses_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(IlmCompileError, match=message):
        Beta2Scheduler(optimizer(), **options)


def test_beta2_refuses_an_optimizer_without_betas() -> None:
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(IlmCompileError, match="whose groups have betas, such as AdamW, got SGD"):
        Beta2Scheduler(sgd, init_beta2=0.9)

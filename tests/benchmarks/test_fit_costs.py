"""Fitting the constants: the values reach the model, and leave it nearer to what was measured."""

from dataclasses import replace

import pytest

from benchmarks.fit_costs import (
    CONSTANTS,
    GIGABYTES,
    TIME,
    fit,
    unfitted,
)
from benchmarks.step_rows import Step
from ilm_compile.cost.constants import SOFTWARE
from ilm_compile.cost.hardware import HARDWARE
from tests.cost.steps import GPT, plan

STARTS = [constant.start for constant in CONSTANTS]


@pytest.fixture(name="steps")
def _steps() -> list[Step]:
    """Steps that take a fifth longer than the constants say that they start from."""
    steps = [
        Step(
            id=str(tp),
            source=f"source {tp}",
            model="GPT",
            sizes=GPT,
            plan=plan(tp=tp, recompute="full"),
            hardware=HARDWARE["a100-80g"],
            software=SOFTWARE["megatron"],
            seconds=1.0,
            gigabytes=None,
        )
        for tp in (1, 2, 4)
    ]
    return [
        replace(step, seconds=1.2 * seconds)
        for step, seconds in zip(steps, TIME.predict(STARTS, steps), strict=True)
    ]


def worst(steps: list[Step], predicted: list[float]) -> float:
    return max(abs(p / (s.seconds or 1) - 1) for s, p in zip(steps, predicted, strict=True))


def test_the_fit_explains_what_was_measured(steps: list[Step]) -> None:
    assert worst(steps, TIME.predict(STARTS, steps)) > 0.15
    assert worst(steps, TIME.predict(fit(steps), steps)) < 0.05


def test_the_fit_keeps_to_its_bounds_and_is_the_same_again(steps: list[Step]) -> None:
    values = fit(steps)
    assert all(c.low <= v <= c.high for c, v in zip(CONSTANTS, values, strict=True))
    assert fit(steps) == values


def test_what_is_unfitted_has_not_seen_its_group(steps: list[Step]) -> None:
    alone = unfitted(steps, {"first": [0], "rest": [1, 2]})
    assert alone[0] == TIME.predict(fit(steps[1:]), steps)[0]


def test_a_constant_of_one_program_leaves_the_others(steps: list[Step]) -> None:
    (position,) = (
        i
        for i, c in enumerate(CONSTANTS)
        if c.owners == ("megatron-deepspeed",) and c.field == "loss_traffic"
    )
    changed = [*STARTS]
    changed[position] *= 3
    assert TIME.predict(changed, steps) == TIME.predict(STARTS, steps)


def test_memory_is_fitted_and_held_out_alike(steps: list[Step]) -> None:
    values = [2e9, 0.5]
    found = GIGABYTES.predict(values, steps)
    held = [replace(step, gigabytes=each) for step, each in zip(steps, found, strict=True)]
    assert [step.predicted_gb for step in held] != pytest.approx(found, rel=0.01)
    fitted = GIGABYTES.predict(fit(held, GIGABYTES), held)
    assert fitted == pytest.approx(found, rel=0.01)
    alone = unfitted(held, {"first": [0], "rest": [1, 2]}, GIGABYTES)
    assert alone[0] == GIGABYTES.predict(fit(held[1:], GIGABYTES), held[:1])[0]

"""The mutation suite itself: its faults are faults, and its verdicts say who found them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ilm_compile.schedule import build
from ilm_compile.verify import mutate_program, mutate_schedule
from ilm_compile.verify.mutations import (
    LAYERS,
    Verdict,
    judge_all,
    program_mutants,
    schedule_mutants,
    spread,
)
from tests.verify.small import make_deep_trial, make_trial

EQUIVALENT = {
    "drop a recompute boundary",
    "move a node to another stage",
    "rename two micro-batches",
    "reorder a send",
    "reorder a receive",
    "post receives late",
}


@pytest.fixture(scope="module")
def trial():
    plan = {"tp": 2, "pp": 2, "checkpoint": True, "num_microbatches": 2}
    return make_trial("internlm2", **plan, sequence_parallel=True)


@pytest.fixture(scope="module")
def verdicts(trial):
    return list(judge_all(trial, limit=2))


def test_no_mutant_is_missed(verdicts):
    assert not [v for v in verdicts if v.outcome == "missed"]


def test_only_harmless_kinds_have_equivalent_mutants(verdicts):
    assert {v.kind for v in verdicts if v.outcome == "equivalent"} <= EQUIVALENT


def test_each_layer_is_the_first_to_find_something(verdicts):
    assert {v.first() for v in verdicts if v.caught} == set(LAYERS) - {"blocks"}


def test_faults_in_blocks_that_take_no_step_are_found():
    """Collectives by the types, all else by the comparison of blocks; neither is enough."""
    trial = make_deep_trial(tp=2)
    verdicts = list(judge_all(trial, limit=2))
    assert not [v for v in verdicts if v.outcome == "missed"]
    only = {tuple(v.caught) for v in verdicts if v.difference > 1e-12}
    assert {("types",), ("blocks",)} <= only


def test_a_scaled_gradient_is_found_by_the_step_alone(verdicts):
    scaled = [v for v in verdicts if v.kind == "scale a gradient"]
    assert scaled
    assert all(list(v.caught) == ["step"] for v in scaled)
    assert min(v.difference for v in scaled) > 1e-8


def test_what_only_bf16_can_get_wrong_is_found_without_running_it():
    trial = make_trial("internlm2", tp=2, dtype=torch.bfloat16)
    kinds = {"skip a cast": "structure", "round a partial sum": "types"}
    for mutant in program_mutants(trial.program, limit=2):
        if mutant.kind in kinds:
            verdict = trial.judge(mutant)
            assert verdict.first() == kinds[mutant.kind], verdict
            # a step finds no more than what cannot run at all: float64 rounds nothing
            assert verdict.caught.get("step", "RuntimeError").startswith("RuntimeError"), verdict


def test_making_a_mutant_leaves_the_program_alone(trial):
    before = trial.program.dump(), dict(trial.program.variables), list(trial.program.regions)
    for mutant in program_mutants(trial.program, limit=1):
        changed, _ = mutant.make(trial.program, trial.schedule)
        assert changed is not trial.program
    after = trial.program.dump(), dict(trial.program.variables), list(trial.program.regions)
    assert before == after


def test_every_program_fault_changes_the_program(trial):
    books = (
        trial.program.dump(),
        trial.program.regions,
        [v.placement for v in trial.program.variables.values()],
    )
    for mutant in program_mutants(trial.program, limit=3):
        changed, _ = mutant.make(trial.program, trial.schedule)
        assert books != (
            changed.dump(),
            changed.regions,
            [v.placement for v in changed.variables.values()],
        ), mutant


def test_every_schedule_fault_changes_the_schedule():
    schedule = build("interleaved_1f1b", pp=2, num_chunks=2, num_microbatches=4)
    count = Counter()
    for mutant in schedule_mutants(schedule):
        _, changed = mutant.make(None, schedule)
        assert changed.actions != schedule.actions, mutant
        count[mutant.kind] += 1
    assert set(count) == set(mutate_schedule.KINDS)


def test_the_kinds_of_the_two_tables_have_different_names():
    assert not set(mutate_program.KINDS) & set(mutate_schedule.KINDS)


@pytest.mark.parametrize(
    ("caught", "difference", "outcome"),
    [({"types": "no"}, 0.0, "caught"), ({}, 1e-15, "equivalent"), ({}, 1e-11, "missed")],
)
def test_outcome(caught, difference, outcome):
    assert Verdict("kind", "what", caught, difference).outcome == outcome


def test_first_layer_that_is_not_switched_off():
    verdict = Verdict("kind", "what", {"step": "no", "types": "no"}, 1.0)
    assert verdict.first() == "types"
    assert verdict.first(without="types") == "step"
    assert Verdict("kind", "what", {"step": "no"}, 1.0).first(without="step") is None


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(None, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (3, [0, 2, 4]), (2, [0, 4]), (1, [0])],
)
def test_spread(limit, expected):
    assert spread(list(range(5)), limit) == expected

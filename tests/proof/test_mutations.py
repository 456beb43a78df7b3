"""The mutation suite itself: its faults are faults, and its verdicts say who found them."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest

from benchmarks import mutation_cases
from ilm_compile.errors import ProgramError, ScheduleError
from ilm_compile.proof import mutate_program, mutate_schedule
from ilm_compile.proof.mutations import (
    Trial,
    Verdict,
    program_mutants,
    schedule_mutants,
    spread,
)
from ilm_compile.schedule import build, check
from tests.proof.small import make_trial

HARMLESS = {
    "drop a recompute boundary",
    "move a node to another stage",
    "rename two micro-batches",
    "reorder a send",
    "reorder a receive",
    "post receives late",
}
PLANS: dict[str, dict[str, Any]] = {
    "split": {"tp": 2, "pp": 2, "checkpoint": True, "sequence_parallel": True},
    "fused": {"tp": 2, "kernels": "triton"},
    "internlm2, pp=2": {"pp": 2},
}
FROZEN = "internlm2, frozen"


@cache
def trial_of(name: str) -> Trial:
    """The trial of a case of the benchmark, or of one of `PLANS`."""
    if name in PLANS:
        return make_trial("internlm2", **PLANS[name])
    return mutation_cases.make_trial(name, mutation_cases.CASES[name].plans[0])


WRITTEN, LONG, MASKS = "written by hand", "internlm2, long", "Llama, masks"
# Each kind of program fault, where it can be seen, and a layer that refuses it.
KINDS = [
    ("drop a collective", "split", "types"),
    ("double a collective", "split", "types"),
    ("retype a collective", "split", "types"),
    ("flip a shard dim", "split", "types"),
    ("swap segments", WRITTEN, "types"),
    ("move a node to another stage", "split", "structure"),
    ("leave a node in no stage", "split", "structure"),
    ("round a partial sum", LONG, "types"),
    ("change an epsilon", WRITTEN, "regions"),
    ("double a scale", WRITTEN, "regions"),
    ("double a soft cap", WRITTEN, "regions"),
    ("change a constant", "internlm2, documents", "regions"),
    ("shift a slice", "internlm2, pp=2", "regions"),
    ("use another activation", WRITTEN, "regions"),
    ("swap operands", "split", "regions"),
    ("swap two parameters", "split", "regions"),
    ("swap parameters of two blocks", "split", "regions"),
    ("drop a residual", "split", "regions"),
    ("drop a fused residual", "fused", "regions"),
    ("take another result", "fused", "regions"),
    ("ignore position ids", MASKS, "regions"),
    ("ignore an attention mask", MASKS, "regions"),
    ("ignore documents", "internlm2, documents", "regions"),
    ("count an ignored label", WRITTEN, "step"),
    ("clamp ids", WRITTEN, "regions"),
    ("window in one attention", WRITTEN, "regions"),
    ("window in every attention", WRITTEN, "regions"),
    ("window in every attention", "GPT-NeoX", "regions"),
    ("see the future", "Llama", "regions"),
    ("scale a gradient", "split", "regions"),
    ("forget a gradient (tied)", "split", "regions"),
    ("cut a gradient", "split", "regions"),
    ("remove a dropout", WRITTEN, "regions"),
    ("change a dropout rate", WRITTEN, "regions"),
    ("share a dropout mask", WRITTEN, "regions"),
    ("train a frozen weight", FROZEN, "variables"),
    ("freeze a weight", FROZEN, "variables"),
    ("forget a tied name", WRITTEN, "variables"),
    ("change whether a buffer is saved", WRITTEN, "variables"),
    ("double an output", WRITTEN, "regions"),
    ("give another output", WRITTEN, "regions"),
    ("double the target count", WRITTEN, "regions"),
    ("drop the target count", WRITTEN, "regions"),
    ("change a buffer", WRITTEN, "regions"),
    ("skip a cast", LONG, "structure"),
    ("round the residual stream", LONG, "precision"),
    ("round positions", LONG, "precision"),
    ("round the target count", LONG, "precision"),
    ("round rotary tables", LONG, "precision"),
    ("round a norm's input", WRITTEN, "precision"),
    ("round logits", WRITTEN, "precision"),
]


@pytest.mark.parametrize(("kind", "case", "layer"), KINDS)
def test_a_fault_of_the_kind_is_refused_by_the_layer(kind, case, layer):
    trial = trial_of(case)
    mutants = [m for m in program_mutants(trial.program, limit=3) if m.kind == kind]
    found = (trial.judge(mutant).caught for mutant in reversed(mutants))
    assert any(layer in caught for caught in found)


def test_every_kind_of_program_fault_is_tested():
    assert {kind for kind, *_ in KINDS} == set(mutate_program.KINDS) - {"drop a recompute boundary"}


def test_faults_of_schedules_are_caught_or_harmless():
    trial = trial_of("split")
    verdicts = [trial.judge(mutant) for mutant in schedule_mutants(trial.schedule, limit=1)]
    assert not [v for v in verdicts if v.outcome == "missed"]
    assert {v.kind for v in verdicts if v.outcome == "equivalent"} <= HARMLESS
    assert "schedule" in {v.first() for v in verdicts}


def test_a_weight_part_that_is_lost_doubled_or_early_is_refused():
    schedule = build("zb_h1", pp=2, num_microbatches=2)
    kinds = ("drop a compute", "duplicate an action", "weight part before backward")
    wrong = [m for m in schedule_mutants(schedule) if m.kind in kinds and "W" in m.what]
    assert {mutant.kind for mutant in wrong} == set(kinds)
    for mutant in wrong:
        with pytest.raises(ScheduleError, match=r"\dW\d"):
            check(mutant.make(None, schedule)[1])


def test_a_recompute_boundary_that_is_lost_changes_nothing():
    trial = trial_of("split")
    mutants = list(program_mutants(trial.program, limit=1))
    [lost] = [m for m in mutants if m.kind == "drop a recompute boundary"]
    assert trial.judge(lost).outcome == "equivalent"


def test_faults_in_the_last_block_are_caught():
    trial = trial_of("split")
    mutants = list(program_mutants(trial.program))
    [last] = [m for m in mutants if m.kind == "change an epsilon" and "layers.1.ffn" in m.what]
    assert {"regions", "step"} <= set(trial.judge(last).caught)


def test_a_program_that_is_wrong_before_it_is_broken_is_refused():
    trial = trial_of("split")
    mutants = list(program_mutants(trial.program, limit=1))
    [wrong] = [m for m in mutants if m.kind == "change an epsilon"]
    program, schedule = wrong.make(trial.program, trial.schedule)
    with pytest.raises(ProgramError, match="refused before it is broken"):
        Trial(trial.traced, program, schedule, trial.model)


def test_making_a_mutant_leaves_the_program_alone():
    trial = trial_of("split")
    before = _books(trial.program), trial.program.facts.copy()
    for mutant in program_mutants(trial.program, limit=1):
        changed, _ = mutant.make(trial.program, trial.schedule)
        assert changed is not trial.program
    assert (_books(trial.program), trial.program.facts) == before


@pytest.mark.parametrize("case", ["split", WRITTEN, "internlm2, documents"])
def test_every_program_fault_changes_the_program(case):
    trial = trial_of(case)
    before = _books(trial.program)
    for mutant in program_mutants(trial.program, limit=2):
        changed, _ = mutant.make(trial.program, trial.schedule)
        assert _books(changed) != before, mutant


def _books(program):
    return program.dump(), list(program.regions), [repr(v) for v in program.variables.values()]


def test_every_schedule_fault_changes_the_schedule():
    count = Counter()
    for name in ("interleaved_1f1b", "zb_v"):
        schedule = build(name, pp=2, num_chunks=2, num_microbatches=4)
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
    [(None, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (3, [0, 2, 4]), (2, [0, 4])],
)
def test_spread(limit, expected):
    assert spread(list(range(5)), limit) == expected


def test_spread_of_one_depends_on_the_seed():
    found = {spread(list(range(5)), 1, seed=str(seed))[0] for seed in range(40)}
    assert found == {0, 1, 2, 3, 4}

"""Faults of programs with fused ops: each is found."""

from __future__ import annotations

import pytest

from ilm_compile.proof.mutations import program_mutants
from tests.proof.small import make_trial

KINDS = (
    *("drop a fused residual", "take another result", "drop a collective", "flip a shard dim"),
    *("change an epsilon", "swap operands", "window in one attention"),
)


@pytest.fixture(scope="module")
def trial():
    return make_trial("internlm2", tp=2, kernels="triton")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_a_fused_program_is_caught(trial, kind):
    mutants = [m for m in program_mutants(trial.program, limit=1) if m.kind == kind]
    assert mutants
    assert {trial.judge(mutant).outcome for mutant in mutants} == {"caught"}

"""Faults of programs with fused ops: each is found, and blocks are compared across stages."""

from __future__ import annotations

from ilm_compile.verify.blocks import check_blocks
from ilm_compile.verify.mutations import program_mutants
from tests.verify.small import make_deep_trial, make_trial

KINDS = {"drop a fused residual", "take another result", "drop a collective", "flip a shard dim"}


def test_no_mutant_of_a_fused_program_is_missed() -> None:
    trial = make_trial("internlm2", tp=2, kernels="triton")
    mutants = [m for m in program_mutants(trial.program, limit=2) if m.kind in KINDS]
    assert {mutant.kind for mutant in mutants} == KINDS
    assert {trial.judge(mutant).outcome for mutant in mutants} == {"caught"}


def test_a_block_that_begins_a_stage_is_like_one_that_does_not() -> None:
    """In the deep program the cut falls elsewhere, and there the sum is not fused."""
    trial = make_deep_trial(tp=2, pp=2, kernels="triton")
    check_blocks(trial.program, trial.stepped)

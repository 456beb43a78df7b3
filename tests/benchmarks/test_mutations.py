"""The mutation benchmark: its tables, and torch's loader behind its one adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from benchmarks import mutations
from benchmarks.mutation_cases import CASES, make_trial
from benchmarks.mutations import Judged
from benchmarks.torch_schedules import refusal
from ilm_compile.errors import ScheduleError
from ilm_compile.proof import mutate_program
from ilm_compile.proof.mutations import Verdict
from ilm_compile.schedule import build, check

JUDGED = [
    Judged("a case", Verdict("scale a gradient", "here", {"step": "no"}, 1.0)),
    Judged("a case", Verdict("double a collective", "there", {"types": "no"}, 0.0)),
    Judged("a case", Verdict("rename two micro-batches", "0 and 1", {}, 0.0)),
]


def text(table):
    console = Console(width=150)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def row(table, first):
    lines = [line for line in text(table).splitlines() if line.startswith(f"│ {first}")]
    return [cell.strip() for cell in lines[0].strip("│").split("│")]


def test_rates_leave_equivalent_mutants_out():
    assert row(mutations.by_kind(JUDGED), "all")[1:6] == ["3", "1", "1", "0", "100%"]


def test_a_layer_switched_off_misses_what_it_alone_refuses():
    table = mutations.ablation(JUDGED)
    assert row(table, "none")[1:3] == ["100.0%", "0"]
    assert row(table, "step") == ["step", "50.0%", "1", "1", "scale a gradient (1)"]
    assert row(table, "types") == ["types", "50.0%", "1", "0", "double a collective (1)"]


def test_equivalent_mutants_are_named_with_a_reason():
    named = text(mutations.equivalents(JUDGED))
    assert "0 and 1" in named
    assert "their gradients are summed in another order" in named
    assert "there" not in named


def test_attacks_are_named_with_the_layers_that_refuse_them():
    judged = [Judged("a case", Verdict("change an epsilon", "x", {"regions": "no"}, 1.0))]
    cells = row(mutations.attacks(judged), "the epsilon")
    assert cells[1:] == ["1", "1", "0", "0", "regions 1"]


def test_every_attack_names_kinds_that_there_are():
    kinds = {kind for kinds in mutations.ATTACKS.values() for kind in kinds}
    assert kinds <= set(mutate_program.KINDS)


def test_a_case_is_judged():
    result = mutations.run_case(1, ("skip connection", {"tp": 2}))
    assert result.possible > len(result.judged) > 15
    assert {item.verdict.outcome for item in result.judged} <= {"caught", "equivalent"}


@pytest.mark.parametrize("name", ["written by hand", "numbers in", "internlm2, documents"])
def test_our_cases_can_be_made(name):
    assert make_trial(name, CASES[name].plans[-1]).expected


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_torch_accepts_a_schedule_of_which_a_send_is_lost(name):
    right = build(name, pp=2, num_microbatches=4)
    assert refusal(right) is None
    row = tuple(action for action in right.actions[0] if str(action) != "0SEND_F2")
    wrong = replace(right, actions=(row, right.actions[1]))
    assert refusal(wrong) is None
    with pytest.raises(ScheduleError, match="rank 0 never runs 0SEND_F2"):
        check(wrong)


def test_torch_refuses_a_schedule_of_which_a_forward_is_lost():
    right = build("1f1b", pp=2, num_microbatches=4)
    row = tuple(action for action in right.actions[0] if str(action) != "0F3")
    assert refusal(replace(right, actions=(row, right.actions[1]))) is not None

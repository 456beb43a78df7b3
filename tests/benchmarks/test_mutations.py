"""The mutation benchmark: its tables, and torch's loader behind its one adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import mutations
from benchmarks.common import show_table
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


def line(lines, first):
    return next(line for line in lines if line[0].startswith(first))


def test_rates_leave_equivalent_mutants_out():
    assert line(mutations.by_kind(JUDGED), "all")[1:6] == (3, 1, 1, 0, "100%")


def test_a_layer_switched_off_misses_what_it_alone_refuses():
    lines = list(mutations.ablation(JUDGED))
    assert line(lines, "none")[1:3] == ("100.0%", 0)
    assert line(lines, "step") == ("step", "50.0%", 1, 1, "scale a gradient (1)")
    assert line(lines, "types") == ("types", "50.0%", 1, 0, "double a collective (1)")


def test_equivalent_mutants_are_named_with_a_reason():
    reason = "their gradients are summed in another order"
    named = list(mutations.equivalents(JUDGED))
    assert named == [("a case", "rename two micro-batches", "0 and 1", reason)]


def test_all_tables_are_shown(capsys):
    for title, columns, lines in mutations.TABLES:
        show_table(title, columns, lines(JUDGED))
    assert "Attacks that went through an earlier proof" in capsys.readouterr().out


def test_attacks_are_named_with_the_layers_that_refuse_them():
    judged = [Judged("a case", Verdict("change an epsilon", "x", {"regions": "no"}, 1.0))]
    cells = line(mutations.attacks(judged), "the epsilon")
    assert cells[1:] == (1, 1, 0, 0, "regions 1")


def test_every_attack_names_kinds_that_there_are():
    kinds = {kind for kinds in mutations.ATTACKS.values() for kind in kinds}
    assert kinds <= set(mutate_program.KINDS)


def test_a_case_is_judged():
    judged, possible = mutations.run_case(1, ("skip connection", {"tp": 2}))
    assert possible > len(judged) > 15
    assert {item.verdict.outcome for item in judged} <= {"caught", "equivalent"}


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

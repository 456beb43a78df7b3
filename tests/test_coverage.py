"""The systematic coverage: every architecture in a process and a time of its own, and its table."""

from __future__ import annotations

import os
import time

from benchmarks.sharding_table import Row, coverage_table, table
from tests.support.coverage import Coverage, Sharded, cover, cover_all
from tests.support.equality import Errors

EQUAL = Coverage("A", "equal", nodes=7, sharded=[Sharded(2, 1e-16, 2e-15, 0.01, 0.0)], seconds=1.0)


def fake(architecture, sizes):
    if architecture == "slow":
        time.sleep(60)
    if architecture == "dead":
        os._exit(1)
    return Coverage(architecture, "equal", nodes=len(sizes))


def test_one_that_hangs_or_dies_does_not_stop_the_others():
    names = ["first", "slow", "dead", "last"]
    found = list(cover_all(names, (2, 4), cover=fake, limit_s=1.0))
    assert [row.architecture for row in found] == names
    assert [row.outcome for row in found] == ["equal", "wrong", "wrong", "equal"]
    assert [row.reason for row in found[1:3]] == ["no answer within 1 s", "its process died"]
    assert found[0].nodes == 2


def test_what_transformers_cannot_run_on_text_is_unusable():
    found = cover("MusicgenForCausalLM", [2])
    assert found.outcome == "unusable"
    assert "invalid for input of size" in found.reason


def test_the_table_of_coverage_has_a_line_each_and_the_totals():
    refused = Coverage("B", "refused", "trace: because")
    lines = list(coverage_table([EQUAL, refused, refused]))
    assert lines[2] == "| A | equal | 7 | 1.0%, 0.0% | 2e-15 |  |"
    assert lines[3] == "| B | refused |  |  |  | trace: because |"
    assert lines[-1] == "3 architectures: 2 refused, 1 equal"


def test_the_table_of_models_is_markdown():
    errors = {"tp=2": Errors(0.0, 3e-15, "w"), "tp=4": Errors(1e-16, 2e-15, "w")}
    lines = table([Row("Llama", 138, 0.0021, 0.0, errors)]).splitlines()
    assert lines[2] == "| Llama | 138 | 0.2% | 0.0% | 0e+00 / 3e-15 | 1e-16 / 2e-15 |"

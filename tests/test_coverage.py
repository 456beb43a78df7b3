"""The systematic coverage: every architecture in a process and a time of its own, and its table."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import coverage
from benchmarks.sharding_table import Row, table
from tests.support.coverage import Coverage, Sharded, cover, cover_all
from tests.support.equality import Errors

ROOT = Path(__file__).parents[1]
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
    lines = coverage.table([EQUAL, refused, refused]).splitlines()
    assert lines[2] == "| A | equal | 7 | 1.0%, 0.0% | 2e-15 |  |"
    assert lines[3] == "| B | refused |  |  |  | trace: because |"
    assert lines[-1] == "3 architectures: 2 refused, 1 equal"


def test_trying_again_keeps_what_was_equal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coverage, "FILE", tmp_path / "coverage.json")
    monkeypatch.setattr(coverage, "architectures", lambda: ["first", "dead"])
    monkeypatch.setattr(coverage, "cover_all", lambda names, *_, **__: map(answer, names))
    coverage.main([])
    first = capsys.readouterr().out.splitlines()[-1]
    assert "of the 2 causal language model classes" in first
    assert "tried small, 1 are captured, sharded at tp=2 and tp=4" in first
    assert "at most 1.0% of weights or FLOPs repeated; 1 are refused" in first
    monkeypatch.setattr(coverage, "cover_all", lambda names, *_, **__: map(mended, names))
    coverage.main(["--again"])
    content = json.loads(coverage.FILE.read_text())
    assert content["tried"] == ["dead"]
    assert [row["outcome"] for row in content["architectures"]] == ["equal", "equal"]
    assert "2 are captured" in coverage.sentence(content)


def answer(name):
    return replace(EQUAL, architecture=name, outcome="refused" if name == "dead" else "equal")


def mended(name):
    return replace(EQUAL, architecture=name)


def test_the_readme_says_what_the_results_say():
    content = json.loads(coverage.FILE.read_text())
    text = " ".join((ROOT / "README.md").read_text().split())
    assert coverage.sentence(content) in text


def test_the_table_of_models_is_markdown():
    errors = {"tp=2": Errors(0.0, 3e-15, "w"), "tp=4": Errors(1e-16, 2e-15, "w")}
    lines = table([Row("Llama", 138, 0.0021, 0.0, errors)]).splitlines()
    assert lines[2] == "| Llama | 138 | 0.2% | 0.0% | 0e+00 / 3e-15 | 1e-16 / 2e-15 |  |  |  |"

"""The example of a custom pass and the page that explains it: every line of both is run."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import custom_pass
from ilm_compile.errors import PlanError
from ilm_compile.proof.check_pass import PassCheck
from tests.sharding.proof import all_strategies, make_call, prove

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(python(?: example)?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(kind: str) -> list[str]:
    page = (ROOT / "docs" / "custom_passes.md").read_text()
    return [text for tag, text in BLOCK.findall(page) if tag == kind]


def test_page_quotes_the_example() -> None:
    source = (ROOT / "examples" / "custom_pass.py").read_text()
    quoted = blocks("python example")
    assert len(quoted) == 9
    assert [text for text in quoted if text not in source] == []


def test_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace: dict[str, Any] = {}
    for text in blocks("python"):
        exec(compile(text, "custom_passes.md", "exec"), namespace)
    assert namespace["report"].ok
    assert (tmp_path / "stages" / "stage_1.py").exists()
    sys.modules.pop("stage_1", None)


def test_placement_rule_of_the_op_is_right() -> None:
    inputs = (torch.randn(2, 4, 8).double(), torch.randn(2, 4, 8).double())
    call, tensors = make_call(torch.ops.example.swiglu.default, inputs, {}, 2)
    found = all_strategies(call)
    assert {str(s.output) for s in found} >= {"I", "R", "S(0)", "S(1)", "S(2)"}
    for strategy in found:
        prove(call, tensors, strategy)


def test_gradient_of_the_op_is_right() -> None:
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(custom_pass.swiglu, inputs)


def test_main_checks_the_passes_and_prints_the_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked: list[str] = []

    def check(step: Any) -> PassCheck:
        checked.append(step.name)
        report = PassCheck(step.name, (), 0.0)
        monkeypatch.setattr(PassCheck, "raise_if_failed", lambda self: None)
        return report

    monkeypatch.setattr(custom_pass, "check_pass", check)  # test_check_pass runs the real one
    custom_pass.main()
    printed = capsys.readouterr().out
    assert checked == ["fuse-swiglu", "soft-cap", "merge-gate-up"]
    assert "soft-cap: " in printed
    assert "+ swiglu: " in printed
    assert "+ tanh: " in printed


def test_cap_must_be_positive() -> None:
    with pytest.raises(PlanError, match="soft-cap: cap must be positive, got 0"):
        custom_pass.SoftCap(cap=0)

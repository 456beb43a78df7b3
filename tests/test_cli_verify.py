"""The command `ilm-compile verify`: a table or JSON, and the exit code says whether to launch."""

import json
from pathlib import Path

import pytest

import ilm_compile
from ilm_compile.cli import main


def test_a_right_plan_exits_with_0_and_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "internlm2_tiny", "--tp", "2", "--pp", "2", "--dp", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("verify InternLM2: tp=2, pp=2, num_microbatches=2, dp=2\n")
    assert "8 ranks emulated" in out
    assert "verdict: equal to the single-device model" in out


@pytest.mark.parametrize(("options", "dp"), [([], 2), (["--dp", "1"], 1)])
def test_data_parallel_ranks_are_those_of_the_plan_if_none_are_given(
    tmp_path: Path, options: list[str], dp: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(ilm_compile.make_plan(dp=2).to_json())
    assert main(["verify", "internlm2_tiny", "--plan", str(path), *options]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(f" dp={dp}")


def test_a_plan_that_does_not_fit_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "internlm2_tiny", "--tp", "3"]) == 1
    captured = capsys.readouterr()
    assert "tp=3 does not divide the 8 attention heads" in captured.out
    assert "verdict: NOT equal: do not launch" in captured.out
    assert captured.err == "ilm-compile: verify InternLM2: tp=3, dp=1: types failed\n"


def test_json_is_all_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "internlm2_tiny", "--pp", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["max_grad_error"] < 1e-12


def test_a_config_brings_its_model_plan_and_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "examples/configs/tiny_cpu.toml", "--pp", "2"]) == 0
    out = capsys.readouterr().out
    assert "tp=2, pp=2, num_microbatches=4" in out.splitlines()[0]
    assert "4 ranks emulated" in out


def test_what_a_config_says_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "examples/configs/tiny_cpu.toml", "--seq-len", "64"]) == 1
    assert "says it already: leave out --seq-len" in capsys.readouterr().err

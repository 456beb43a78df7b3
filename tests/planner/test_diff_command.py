"""`ilm-compile diff`: plans of one model side by side, predicted and measured."""

import json
from pathlib import Path

import pytest

import ilm_compile
from ilm_compile.cli.entry import main
from ilm_compile.planner import expect
from ilm_compile.program.plan import Plan


@pytest.fixture
def plans(tmp_path: Path) -> list[str]:
    found = []
    for name, schedule in (("a", "1f1b"), ("b", "zb_h1")):
        path = tmp_path / f"{name}.json"
        path.write_text(Plan(pp=2, num_microbatches=4, schedule=schedule).to_json())
        found.append(str(path))
    return found


def run_folder(folder: Path, seconds: list[float]) -> str:
    folder.mkdir()
    lines = [
        json.dumps({"step": step, "step_time_s": value, "loss": 5.0 - step})
        for step, value in enumerate(seconds, 1)
    ]
    lines.insert(2, json.dumps({"step": 2, "group": "valid/en", "loss": 1.0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def rows(text: str) -> dict[str, list[str]]:
    split = ([c.strip() for c in line.split("   ") if c.strip()] for line in text.splitlines())
    return {cells[0]: cells[1:] for cells in split if len(cells) > 1}


def test_what_differs_and_what_is_predicted(
    plans: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", "internlm2_tiny", *plans]) == 0
    table = rows(capsys.readouterr().out)
    assert table["schedule"] == ["1f1b", "zb_h1"]
    assert "pp" not in table
    expected = [
        expect(ilm_compile.partition(ilm_compile.models.internlm2_tiny(), plan=plan))
        for plan in plans
    ]
    assert table["predicted: ms of a step"] == [f"{s.seconds * 1e3:.3f}" for s in expected]


def test_runs_are_measured_after_their_first_steps(
    plans: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        run_folder(tmp_path / "runs-a", [9.0, 9.0, 9.0, 2.0, 4.0, 3.0]),
        run_folder(tmp_path / "runs-b", [9.0, 9.0, 9.0, 1.0]),
    ]
    assert main(["diff", "internlm2_tiny", *plans, "--runs", *folders]) == 0
    table = rows(capsys.readouterr().out)
    assert table["measured: seconds of a step"] == ["3.0000", "1.0000"]
    assert table["measured: last loss"] == ["-1.0000", "1.0000"]


def test_wrong_arguments_are_refused(
    plans: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = run_folder(tmp_path / "runs-a", [1.0, 1.0])
    cases = {
        "got 1 plans and 0 runs": [plans[0]],
        "got 2 plans and 1 runs": [*plans, "--runs", empty],
        "has 2 steps; expected more than 3": [*plans, "--runs", empty, empty],
        "has no metrics.jsonl": [*plans, "--runs", str(tmp_path), str(tmp_path)],
    }
    for message, arguments in cases.items():
        assert main(["diff", "internlm2_tiny", *arguments]) == 1
        assert message in capsys.readouterr().err

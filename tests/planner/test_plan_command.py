"""`ilm-compile plan`: the table, the reasons, the file, and what it refuses."""

import json
from pathlib import Path

import pytest

from ilm_compile import Plan, models
from ilm_compile.cli import main

ASKED = ["--gpus", "8", "--tokens-per-batch", "64K", "--seq", "2048"]


def tiny() -> models.InternLM2:
    return models.internlm2_tiny(num_layers=2)


MODEL = f"{__name__}:tiny"


@pytest.fixture(name="plan_file")
def _plan_file(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


def test_it_prints_plans_and_reasons_and_writes_the_fastest(
    plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", MODEL, *ASKED, "--output", str(plan_file)]) == 0
    printed = capsys.readouterr().out
    assert "on 8 x h100, 32 sequences of 2048 tokens" in printed
    assert "tokens/s/GPU" in printed
    assert "pp=4: has more stages than 2 layers" in printed
    assert "x the time" in printed
    plan = Plan.from_json(plan_file)
    assert plan.ranks_per_replica * (plan.dp or 0) == 8
    assert plan.hardware == "h100"


def test_other_commands_take_the_file(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", MODEL, *ASKED, "--output", str(plan_file)])
    changed = json.loads(plan_file.read_text()) | {"tp": 2, "dp": None}
    plan_file.write_text(json.dumps(changed))
    capsys.readouterr()
    assert main(["explain", MODEL, "--plan", str(plan_file)]) == 0
    assert "tp=2" in capsys.readouterr().out


def test_the_file_is_the_same_again(plan_file: Path) -> None:
    texts = []
    for _ in range(2):
        main(["plan", MODEL, *ASKED, "--output", str(plan_file)])
        texts.append(plan_file.read_text())
    assert texts[0] == texts[1]


def test_few_and_all(plan_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = []
    for more in (["--top", "1"], ["--top", "5"], ["--top", "5", "--all"]):
        main(["plan", MODEL, *ASKED, *more, "--output", str(plan_file)])
        lengths.append(len(capsys.readouterr().out.splitlines()))
    assert lengths[0] < lengths[1] <= lengths[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--tokens-per-batch", "many"], "--tokens-per-batch: expected a number above 0 and one"),
        (["--memory", "80 elephants"], "--memory: expected a number above 0 and one of B, KB, MB"),
        (["--memory", "0GiB"], "--memory: expected a number above 0"),
        (["--hardware", "v100"], "unknown hardware 'v100'; known are a100-40g"),
        (["--tokens-per-batch", "3000"], "tokens_per_batch=3000 is not a multiple of seq=2048"),
        (["--memory", "1MiB"], "no plan on 8 x h100 fits 0.0 GiB; nearest is"),
        (["--precision", "int4"], "precision='int4'; known are"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_question_is_refused(
    plan_file: Path, capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    assert main(["plan", MODEL, *ASKED, *changes, "--output", str(plan_file)]) == 1
    assert message in capsys.readouterr().err
    assert not plan_file.exists()

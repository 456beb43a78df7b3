"""`ilm-compile plan`: the table, the reasons, the file, and what it refuses."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from ilm_compile import Plan, PlanError, models, partition
from ilm_compile.cli import main
from ilm_compile.config import load_config
from tests.training.jobs import tiny as tiny_job

ASKED = ["--gpus", "8", "--tokens-per-batch", "64K", "--seq", "2048"]


def tiny() -> models.InternLM2:
    return models.internlm2_tiny(num_layers=2)


MODEL = f"{__name__}:tiny"


@pytest.fixture(name="plan_file")
def _plan_file(tmp_path: Path) -> Path:
    return tmp_path / "plan.json"


def printed(*options: str) -> str:
    """What the command prints."""
    text = io.StringIO()
    with redirect_stdout(text):
        assert main(["plan", MODEL, *ASKED, *options]) == 0
    return text.getvalue()


@pytest.fixture(name="done", scope="module")
def _done(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """One run: what it printed, and the plan."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    return printed("--top", "3", "--output", str(path)), path


def test_it_prints_plans_and_reasons_and_writes_the_fastest(done: tuple[str, Path]) -> None:
    text, path = done
    assert "on 8 x h100, 32 sequences of 2048 tokens" in text
    assert "tokens/s/GPU" in text
    assert "pp=4: has more stages than 2 layers" in text
    assert "x the time" in text
    assert f"next: ilm-compile explain {MODEL} --plan {path} --seq-len 2048 --rows " in text
    plan = Plan.from_json(path)
    assert plan.ranks_per_replica * (plan.dp or 0) == 8
    assert plan.hardware == "h100"


def test_of_a_config_the_keys_are_named(
    tmp_path: Path, plan_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_job(tmp_path, data={"seq_len": 2048})
    config.save(tmp_path / "job.toml")
    command = ["plan", str(tmp_path / "job.toml"), *ASKED, "--memory", "6GiB"]
    assert main([*command, "--output", str(plan_file)]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith(f"next: ilm-compile train --config {tmp_path / 'job.toml'}")
    keys = [word for word in told.split() if "=" in word]
    plan, wanted = load_config(tmp_path / "job.toml", keys).plan(), Plan.from_json(plan_file)
    assert (plan.tp, plan.pp, plan.zero) == (wanted.tp, wanted.pp, wanted.zero)
    assert plan.num_microbatches == wanted.num_microbatches


def test_other_commands_take_the_file(
    done: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = done[1]
    assert main(["explain", MODEL, "--plan", str(path)]) == 0
    assert f"tp={Plan.from_json(path).tp}" in capsys.readouterr().out


def test_more_plans_and_every_reason_and_the_same_file(
    done: tuple[str, Path], plan_file: Path
) -> None:
    more = printed("--top", "5", "--all", "--output", str(plan_file))
    assert len(more.splitlines()) > len(done[0].splitlines())
    assert plan_file.read_text() == done[1].read_text()


def test_a_plan_that_does_not_compile_is_passed_over(
    plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Plan] = []

    def refuse_the_first(*arguments: Any, plan: Plan, **keywords: Any) -> Any:
        if not refused:
            refused.append(plan)
            raise PlanError("too\nlong a story")
        return partition(*arguments, plan=plan, **keywords)

    monkeypatch.setattr("ilm_compile.cli.search.partition", refuse_the_first)
    assert main(["plan", MODEL, *ASKED, "--output", str(plan_file)]) == 0
    assert "does not compile: too\n" in capsys.readouterr().out
    assert Plan.from_json(plan_file) != refused[0]


def test_no_plan_that_compiles_is_an_error(
    plan_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise PlanError("no")

    monkeypatch.setattr("ilm_compile.cli.search.partition", refuse)
    assert main(["plan", MODEL, *ASKED, "--output", str(plan_file)]) == 1
    assert "the 8 fastest plans do not compile; the first: no" in capsys.readouterr().err
    assert not plan_file.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--tokens-per-batch", "many"], "--tokens-per-batch: expected a number above 0 and one"),
        (
            ["--memory", "80 elephants"],
            "--memory must be a number of bytes as in 80GiB, got '80 ele",
        ),
        (["--memory", "0GiB"], "--memory must be a number of bytes as in 80GiB"),
        (["--hardware", "v100"], "unknown hardware 'v100'; known are a100-40g"),
        (["--tokens-per-batch", "3000"], "tokens_per_batch=3000 is not a multiple of seq=2048"),
        (["--memory", "1MiB"], "no plan on 8 x h100 fits 0.0 of 0.0 GiB; nearest is"),
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

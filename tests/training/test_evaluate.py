"""`ilm-compile evaluate`: what training logs at a step, from that step's checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ilm_compile.cli import main
from ilm_compile.config import Config
from ilm_compile.runtime.checkpoint import CheckpointError
from ilm_compile.runtime.data import write_shard
from ilm_compile.training.evaluation_run import EvaluatedRun, evaluate_run
from tests.support.world import World
from tests.training.jobs import metrics, tiny, train_on

KEYS = ("loss", "perplexity", "accuracy", "num_tokens")
Run = tuple[Path, Config]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The tiny job with two validation sets, trained in this process."""
    folder = tmp_path_factory.mktemp("evaluate")
    for index, name in enumerate(("train/en", "valid/en", "valid/code")):
        (folder / name).mkdir(parents=True)
        write_shard(folder / name / "a.bin", [[5 + index, 6, 7, 8, 9] * 8] * 9)
    data = {"type": "tokenized", "train_folder": str(folder / "train"), "valid_every": 2}
    config = tiny(folder, data={**data, "valid_folder": str(folder / "valid")})
    train_on(0, config)
    return folder, config


@pytest.fixture
def copied(run: Run, tmp_path: Path) -> Run:
    """The same with a copy of the run's folder, to be spoilt."""
    shutil.copytree(run[0] / "tiny", tmp_path / "tiny")
    data = {key: getattr(run[1].data, key) for key in ("type", "train_folder", "valid_folder")}
    return tmp_path, tiny(tmp_path, data=data)


def logged(folder: Path, step: int) -> dict[str, dict[str, float]]:
    """What training logged of each set at a step."""
    lines = [line for line in metrics(folder) if "group" in line and line["step"] == step]
    return {line["group"].removeprefix("valid/"): {k: line[k] for k in KEYS} for line in lines}


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "tiny" / "checkpoints" / f"step-{step:08d}"


def evaluate_on(rank: int, config: Config) -> EvaluatedRun:
    return evaluate_run(config)


def call(folder: Path, *arguments: str) -> int:
    config = folder / "tiny" / "config.toml"
    return main(["evaluate", "--config", str(config), f"--set=logging.folder={folder}", *arguments])


def test_the_newest_checkpoint_gives_what_training_logged_last(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(run[0], "--json", str(tmp_path / "new" / "metrics.json")) == 0
    found = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert found == {
        "checkpoint": str(checkpoint(run[0], 4)),
        "step": 4,
        "sets": logged(run[0], 4),
    }
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"after step 4, {checkpoint(run[0], 4)}"
    assert [line.split()[0] for line in lines] == ["code", "en"]
    assert f"loss {found['sets']['en']['loss']:.6g}  perplexity" in lines[1]


def test_an_earlier_checkpoint_can_be_chosen(run: Run) -> None:
    evaluated = evaluate_run(run[1], f"{checkpoint(run[0], 2)}/")
    assert (evaluated.step, evaluated.sets) == (2, logged(run[0], 2))
    assert evaluated.sets["en"] != logged(run[0], 4)["en"]


@pytest.mark.parametrize("plan", ["parallel.tensor=2", "parallel.pipeline=2"])
def test_every_plan_gives_the_same(run: Run, world2: World, plan: str) -> None:
    data = {key: getattr(run[1].data, key) for key in ("type", "valid_folder")}
    for evaluated in world2.run(evaluate_on, tiny(run[0], plan, data=data)):
        assert evaluated.step == 4
        for name, values in logged(run[0], 4).items():
            assert evaluated.sets[name] == pytest.approx(values, rel=1e-5)


def test_a_run_that_goes_on_is_left_as_it_is(run: Run) -> None:
    working = run[0] / "tiny" / "checkpoints" / "step-00000006.tmp-0123abcd"
    working.mkdir()
    files = sorted(run[0].rglob("*"))
    assert evaluate_run(run[1]).step == 4
    assert sorted(run[0].rglob("*")) == files


def test_a_damaged_checkpoint_is_left_out_and_told(copied: Run) -> None:
    damage(checkpoint(copied[0], 4))
    with pytest.warns(UserWarning, match=r"left out: .*step-00000004/rank-00000-000.safetensors"):
        evaluated = evaluate_run(copied[1])
    assert (evaluated.step, evaluated.sets) == (2, logged(copied[0], 2))


def test_none_is_taken_instead_of_the_one_that_was_chosen(copied: Run) -> None:
    damage(checkpoint(copied[0], 4))
    with pytest.raises(CheckpointError, match=r"no sound checkpoint to evaluate: .*sha256"):
        evaluate_run(copied[1], str(checkpoint(copied[0], 4)))


def damage(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_another_model_is_refused(run: Run) -> None:
    data = {key: getattr(run[1].data, key) for key in ("type", "valid_folder")}
    with pytest.raises(CheckpointError, match=r"of another model .*model.num_layers"):
        evaluate_run(tiny(run[0], "model.num_layers=3", data=data))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "job_name=other"], "other/checkpoints holds no checkpoint of the run; train"),
        (["--checkpoint", "no/step-00000001"], "--checkpoint: expected the folder of a checkpoint"),
        (["--set", "data.valid_folder=absent"], "data.valid_folder: expected a folder that can"),
        (["--set", "parallel.tensor=2"], "need 2 processes: torchrun --nproc-per-node 2"),
        (["--json", "."], "--json: expected a file that can be written, . is a folder"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_missing_is_told_before_any_work(
    run: Run, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(run[0], *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_a_config_without_validation_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.valid_folder is not given, so there is nothing"):
        evaluate_run(tiny(tmp_path))


def test_training_alone_needs_its_data_and_its_profiler(
    copied: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(copied[0], "--set", "data.train_folder=absent") == 0
    with pytest.raises(SystemExit):
        call(copied[0], "--profiling")
    assert "--profiling" in capsys.readouterr().err


def test_metrics_that_are_not_finite_are_null_in_json(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*arguments: Any) -> EvaluatedRun:
        values = {"loss": 1e3, "perplexity": float("inf"), "accuracy": 0.0, "num_tokens": 1}
        return EvaluatedRun("folder", 4, {"en": values})

    monkeypatch.setattr("ilm_compile.cli.evaluate.evaluate_run", diverged)
    assert call(run[0], "--json", str(tmp_path / "a.json")) == 0
    assert json.loads((tmp_path / "a.json").read_text())["sets"]["en"]["perplexity"] is None

"""What a run leaves in its folder of who owns it and how it ended."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.guard.ending import read_ending, record_ending
from ilm_compile.runtime.guard.run_lock import RunLock, RunLockError
from ilm_compile.training.data import TrainBatches, get_train_data_loader
from ilm_compile.training.preflight import StartError
from tests.training.jobs import losses, tiny, train_on


def test_a_folder_in_which_a_job_runs_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    with (
        RunLock(config.run_folder),
        pytest.raises(RunLockError, match=rf"belongs to a job that runs: process {os.getpid()} on"),
    ):
        train_on(0, config)
    assert list(config.run_folder.iterdir()) == []


def test_an_ending_says_after_which_step_it_failed(tmp_path: Path) -> None:
    config = tiny(tmp_path, "train.total_steps=3")
    batches = iter(get_train_data_loader(config))
    broken = [next(batches), next(batches), {"input_ids": torch.zeros(1)}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainBatches, "__iter__", lambda self: iter(broken))
        with pytest.raises(IlmCompileError):
            train_on(0, config)
    ending = read_ending(config.run_folder)
    assert ending is not None
    assert (ending["how"], ending["step"]) == ("failed", 2)


@pytest.mark.parametrize("ending", [None, "failed", "hung"])
def test_a_run_that_died_before_its_first_save_begins_anew(
    ending: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path)
    config.run_folder.mkdir()
    lines = '{"step": 1}\n{"step": 2, "lo'  # cut off
    (config.run_folder / "metrics.jsonl").write_text(lines)
    if ending is not None:
        record_ending(config.run_folder, ending, rank=0)
    assert train_on(0, config) == (4, None)
    assert len(losses(tmp_path)) == 4
    assert (config.run_folder / "metrics-1.jsonl").read_text() == lines
    told = "the run before ended after step 1 without a checkpoint; see metrics-1.jsonl"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"ckpt": {"auto_resume": False}}, {"ckpt": {"enabled": False}}])
def test_a_run_that_is_not_to_be_gone_on_with_is_left_alone(
    change: dict[str, dict[str, bool]], tmp_path: Path
) -> None:
    config = tiny(tmp_path, **change)
    config.run_folder.mkdir()
    (config.run_folder / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(StartError, match="holds an earlier run"):
        train_on(0, config)


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    config = tiny(tmp_path, "train.total_steps=1")
    train_on(0, config)
    shutil.rmtree(config.run_folder / "checkpoints")
    with pytest.raises(StartError, match="holds an earlier run"):
        train_on(0, config)

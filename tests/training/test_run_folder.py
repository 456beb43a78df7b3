"""What a run leaves in its folder of who owns it and how it ended."""

import os
from pathlib import Path

import pytest
import torch

from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.guard.ending import read_ending
from ilm_compile.runtime.guard.run_lock import RunLock, RunLockError
from ilm_compile.training.data import TrainBatches, get_train_data_loader
from tests.training.jobs import tiny, train_on


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

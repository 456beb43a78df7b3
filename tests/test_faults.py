"""Faults injected into real trainings, by the benchmark that makes the table of them all.

That each run is then started again, resumes from the newest complete checkpoint and ends with the
losses of the undisturbed run is checked there: it counts the `problems`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ilm_compile.runtime.guard.ending import ExitCode

ROOT = Path(__file__).parents[1]
FAULTS = (
    "kill -9 of a rank in a step",
    "kill -9 of a rank, torchrun restarts",
    "kill -9 of the launcher",
    "SIGTERM to one rank",
    "hang: endless sleep in a step",
    "wrong world size",
    "other config on one rank",
)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of each fault, by its name."""
    output = tmp_path_factory.mktemp("faults") / "faults.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--repetitions", "1", "--jobs", "4"]
    done = subprocess.run(
        [*command, "--output", str(output), "--only", *FAULTS],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert output.exists(), done.stdout + done.stderr
    return {trial["kind"]: trial for trial in json.loads(output.read_text())["trials"]}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_job_survives(fault: str, trials: dict[str, Any]) -> None:
    """Nothing wrong in silence, no process left, the same curve after the restart."""
    assert trials[fault]["problems"] == []


def test_the_watchdog_names_the_rank_and_the_action(trials: dict[str, Any]) -> None:
    trial = trials["hang: endless sleep in a step"]
    fault, first = trial["fault"], trial["first"]
    assert first["message"].startswith(f"rank {fault['rank']}: busy in step ")
    assert "fault_job.py" in first["message"]
    assert f"rank {1 - fault['rank']}: waiting in step " in first["message"]
    assert ExitCode.HUNG in first["ranks"].values()
    assert first["gone_s"] < 60  # long before torchrun's and the process group's timeouts


def test_sigterm_saves_and_ends_with_success(trials: dict[str, Any]) -> None:
    trial = trials["SIGTERM to one rank"]
    assert trial["first"]["code"] == ExitCode.OK
    assert 0 < trial["first"]["last_step"] < 10
    assert trial["lost_steps"] == 0


def test_ranks_that_torchrun_starts_again_go_on_from_a_checkpoint(trials: dict[str, Any]) -> None:
    trial = trials["kill -9 of a rank, torchrun restarts"]
    assert trial["first"]["code"] == ExitCode.OK
    assert 0 < trial["resumed"] < trial["first"]["last_step"]


def test_a_dead_launcher_leaves_no_orphans_and_loses_nothing(trials: dict[str, Any]) -> None:
    trial = trials["kill -9 of the launcher"]
    assert trial["first"]["left"] == 0
    assert trial["lost_steps"] == 0
    assert trial["first"]["message"].startswith(("SIGTERM", "asked for by rank"))


def test_a_wrong_world_size_is_told_in_one_line(trials: dict[str, Any]) -> None:
    first = trials["wrong world size"]["first"]
    assert first["code"] == ExitCode.ERROR
    assert first["message"] == (
        "ilm-compile: expected a multiple of parallel.tensor*parallel.pipeline = 2 processes, got "
        "3: start 4, or change the plan"
    )


def test_ranks_that_disagree_are_named_with_the_key(trials: dict[str, Any]) -> None:
    first = trials["other config on one rank"]["first"]
    assert "ranks [1] differ from rank 0 in optimizer.lr" in first["message"]
    assert first["last_step"] == 0

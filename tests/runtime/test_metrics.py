"""Metrics as numbers, as lines of a file, and on the screen."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ilm_compile.runtime.metrics import MetricsWriter, Progress, StepMetrics


def metrics(step: int = 1, **changes: Any) -> StepMetrics:
    values = {
        "step": step,
        "loss": 2.5,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "num_tokens": 1000,
        "model_flops": 6e6,
        "step_time_s": 0.5,
        "world_size": 4,
    }
    return StepMetrics.measured(**(values | changes))


def shown(*, rank: int = 0, terminal: bool = False, steps: int = 7) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=120)
    with Progress(steps, rank=rank, every=3, console=console) as progress:
        for step in range(1, steps + 1):
            progress.update(metrics(step))
    return screen.getvalue()


def test_rates_follow_from_tokens_and_time() -> None:
    measured = metrics()
    assert measured.tokens_per_second == 2000
    assert measured.tokens_per_second_per_rank == 500
    assert measured.model_flops_per_second == 12e6


def test_a_line_per_step_holds_every_field(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(metrics(1))
        writer.write(metrics(2))
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {
        "step": 1,
        "loss": 2.5,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "num_tokens": 1000,
        "step_time_s": 0.5,
        "tokens_per_second": 2000,
        "tokens_per_second_per_rank": 500,
        "model_flops_per_second": 12e6,
        "loss_scale": 1.0,
        "is_skipped": False,
        "num_skipped_steps": 0,
        "num_consumed_tokens": 0,
    }
    assert second["step"] == 2


def test_a_line_is_readable_before_the_writer_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(metrics())
        assert len(path.read_text().splitlines()) == 1


def test_a_resumed_run_appends_in_a_folder_made_on_demand(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    for step in (1, 2):
        with MetricsWriter(path) as writer:
            writer.write(metrics(step))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_values_that_are_not_finite_become_null(tmp_path: Path, loss: float) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(metrics(loss=loss))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_without_a_terminal_some_steps_get_a_plain_line() -> None:
    lines = shown().splitlines()
    assert [line.split()[1] for line in lines] == ["1/7", "3/7", "6/7", "7/7"]
    assert lines[0] == "step 1/7  loss 2.5000  grad norm 0.500  lr 1.00e-03  2,000 tokens/s"


def test_on_a_terminal_there_is_a_bar() -> None:
    text = shown(terminal=True)
    assert "\x1b[" in text
    assert "7/7" in text
    assert "loss 2.5000" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_other_ranks_stay_silent(terminal: bool) -> None:
    assert shown(rank=1, terminal=terminal) == ""

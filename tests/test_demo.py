"""The demo: its two trainings agree, and it says so only if they do."""

import subprocess
from io import StringIO
from math import inf, nan
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from ilm_compile.cli import main
from ilm_compile.examples import demo, train_internlm2
from tests.support.world import World

NUM_STEPS = 3


class Parrot(nn.Module):
    """Says the last token again, and never anything else."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.where(nn.functional.one_hot(input_ids, 258) > 0, 0.0, -inf)


def train_on_rank(rank: int, out: Path, plan: dict[str, int]) -> None:
    train_internlm2.train(out, NUM_STEPS, **plan)


def recorder() -> Console:
    return Console(file=StringIO(), width=100)


def text_of(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("plan", [{"tp": 2, "pp": 1}, {"tp": 1, "pp": 2}], ids=str)
def test_two_processes_and_one_have_one_curve(
    tmp_path: Path, world2: World, plan: dict[str, int]
) -> None:
    single, parallel = tmp_path / "single", tmp_path / "parallel"
    world2.run(train_on_rank, parallel, plan)
    demo.train_in_one_process(single, NUM_STEPS)
    comparison = demo.compare(single, parallel)
    assert len(comparison.single) == NUM_STEPS
    assert comparison.single[-1] < comparison.single[0]
    assert max(comparison.differences) < 1e-6
    train_internlm2.make_model().load_state_dict(load_file(parallel / "weights.safetensors"))


@pytest.mark.slow
def test_demo_launches_its_processes_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LOSS_GOAL", 10.0)
    assert demo.main(["--steps", str(NUM_STEPS), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "relative difference" in out
    assert "after training" in out
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for run in ("single", "parallel"):
        assert len((tmp_path / run / "metrics.jsonl").read_text().splitlines()) == NUM_STEPS


def test_demo_fails_when_a_process_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(out: Path, num_steps: int) -> None:
        raise subprocess.CalledProcessError(3, "torchrun")

    monkeypatch.setattr(demo, "train_in_processes", fail)
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "A process failed (exit code 3); see above." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("single", "parallel", "missed"),
    [
        ([5.5, 2.0], [5.5, 2.0], []),
        ([5.5, 4.0], [5.5, 4.0], ["loss 5.50 -> 4.75"]),
        ([2.0, 2.0], [2.0, 2.001], ["largest relative difference of the two curves 5.0e-04"]),
        ([2.0, nan], [2.0, nan], ["loss", "largest relative difference"]),
    ],
    ids=["both goals", "not learned", "not equal", "not a number"],
)
def test_verdict_names_the_goal_that_was_missed(
    single: list[float],
    parallel: list[float],
    missed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "LOSS_GOAL", 4.0)
    console = recorder()
    assert demo.judge(console, demo.Comparison(single, parallel)) is not bool(missed)
    lines = [line for line in text_of(console).splitlines() if line.startswith("MISSED")]
    assert len(lines) == len(missed)
    assert all(text in line for text, line in zip(missed, lines, strict=True))


def test_a_loss_that_is_no_number_is_read_as_nan(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n{"loss": null}\n')
    comparison = demo.compare(tmp_path, tmp_path)
    assert comparison.single[0] == 1.0
    assert comparison.single[1] != comparison.single[1]


def test_table_shows_first_last_and_every_nth_step() -> None:
    curve = [5.0 - step / 10 for step in range(11)]
    console = recorder()
    console.print(demo.table(demo.Comparison(curve, curve), every=5))
    rows = [line.split()[1] for line in text_of(console).splitlines() if line.startswith("│")]
    assert rows == ["1", "5", "10", "11"]


def test_text_goes_on_from_the_prompt() -> None:
    assert demo.write_text(Parrot(), "So", num_tokens=3) == "Soooo"


def test_control_characters_do_not_reach_the_terminal() -> None:
    console = recorder()
    demo.show_texts(console, ["a\x1b[2Jb"], ["line\nline"])
    assert "\x1b" not in text_of(console)
    assert "a?[2Jb" in text_of(console)


@pytest.mark.parametrize("code", [0, 1])
def test_the_command_runs_the_demo_and_ends_as_it_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int
) -> None:
    given: list[list[str]] = []

    def record(words: list[str]) -> int:
        given.append(words)
        return code

    monkeypatch.setattr(demo, "main", record)
    command = ["demo", "--steps", "3", "--out", str(tmp_path)]
    if code:
        with pytest.raises(SystemExit, match="1"):
            main(command)
    else:
        assert main(command) == 0
    assert given == [["--steps=3", f"--out={tmp_path}"]]

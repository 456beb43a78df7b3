"""What the logger writes: lines for people, JSON and TensorBoard for machines."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from rich.console import Console

from ilm_compile.errors import IlmCompileError
from ilm_compile.program.plan import Plan
from ilm_compile.runtime import StepMetrics, Trainer
from ilm_compile.runtime.observe import Logger, WeightsAndBiases
from ilm_compile.runtime.observe.logger import step_line
from ilm_compile.runtime.observe.recorders import JsonLines, Steady
from ilm_compile.runtime.observe.speed import Speed
from tests.runtime.handmade import ROWS, make_batch, make_model, make_parallel
from tests.support.world import World


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


def train(logger: Logger, *, num_steps: int = 3, plan: Plan | None = None) -> None:
    plan = plan or Plan(num_microbatches=2)
    flops = {"model_flops": 1000.0, "hardware_flops": 1250.0}
    parallel = make_parallel(plan, make_model(), **flops)
    batches = [make_batch(2 * ROWS, seed=seed) for seed in range(num_steps)]
    Trainer(parallel, hooks=[logger]).fit(batches, num_steps, progress=False)


def screen(*, terminal: bool = False) -> tuple[io.StringIO, Console]:
    text = io.StringIO()
    return text, Console(file=text, force_terminal=terminal, width=250)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_a_line_for_people_and_one_for_machines(tmp_path: Path) -> None:
    text, console = screen()
    train(Logger(tmp_path, console=console))
    shown = text.getvalue().splitlines()
    assert [line.split()[1] for line in shown] == ["1/3", "2/3", "3/3"]
    assert "left" in shown[0]
    assert "left" not in shown[2]
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3]
    assert f"loss {lines_of(tmp_path)[1]['loss']:.4f}" in shown[1]


def test_on_a_terminal_lines_stand_above_a_bar() -> None:
    text, console = screen(terminal=True)
    train(Logger(console=console))
    assert "\x1b[" in text.getvalue()
    assert "step 2/3  loss" in text.getvalue()


def test_speed_averages_tokens_by_time_over_the_last_steps() -> None:
    """Not the mean of the steps' rates: a short step must not weigh as much as a long one."""
    speed = Speed(2, peak_flops=None, hardware_flops=None)
    for _ in range(20):
        speed.update(metrics(step_time_s=1.0, num_tokens=100))
    for _ in range(5):
        figures = speed.update(metrics(step_time_s=3.0, num_tokens=500))
    assert figures["tokens_per_second_per_rank_10"] == pytest.approx((5 * 100 + 5 * 500) / 20 / 2)
    assert figures["tokens_per_second_per_rank_50"] == pytest.approx((20 * 100 + 5 * 500) / 35 / 2)


def test_only_the_last_fifty_steps_count() -> None:
    speed = Speed(1, peak_flops=None, hardware_flops=None)
    speed.update(metrics(step_time_s=1000.0))
    for _ in range(50):
        figures = speed.update(metrics(step_time_s=1.0, num_tokens=10))
    assert figures["tokens_per_second_per_rank_50"] == pytest.approx(10)


def test_mfu_is_the_models_operations_and_hfu_the_hardwares_per_devices_peak() -> None:
    speed = Speed(4, peak_flops=1e7, hardware_flops=8e6)
    figures = speed.update(metrics(model_flops=6e6, step_time_s=0.5))
    assert figures["mfu"] == pytest.approx(12e6 / 4e7)
    assert figures["hfu"] == pytest.approx(16e6 / 4e7)


def test_figures_of_a_run_follow_from_the_parallels_operations(tmp_path: Path) -> None:
    train(Logger(tmp_path, console=False, peak_flops=1e6), num_steps=1)
    (line,) = lines_of(tmp_path)
    per_second = 2 / line["step_time_s"] / 1e6  # two micro-batches
    assert line["mfu"] == pytest.approx(1000 * per_second)
    assert line["hfu"] == pytest.approx(1250 * per_second)


@pytest.mark.parametrize(
    ("peak", "hardware", "model", "expected"),
    [
        (None, 8e6, 6e6, set()),
        (1e7, None, 6e6, {"mfu"}),
        (1e7, 8e6, math.nan, {"hfu"}),
    ],
    ids=["no-peak", "no-hardware", "no-model"],
)
def test_what_is_not_known_is_left_out(
    peak: float | None, hardware: float | None, model: float, expected: set[str]
) -> None:
    speed = Speed(4, peak_flops=peak, hardware_flops=hardware)
    assert speed.update(metrics(model_flops=model)).keys() & {"mfu", "hfu"} == expected


def test_a_line_tells_of_skips_and_loss_scales_only_where_there_are_any() -> None:
    figures = {"tokens_per_second_per_rank_10": 510.0, "mfu": 0.412}
    plain = step_line(metrics(7), figures, total_steps=100)
    assert plain == (
        "step   7/100  loss 2.5000  grad norm 0.500  lr 1.00e-03  500 tokens/s per device "
        "(510 over 10)  MFU 41.2%  0.5 s"
    )
    bad = metrics(7, grad_norm=math.inf, loss_scale=65536.0, is_skipped=True, num_skipped_steps=3)
    line = step_line(bad, figures, total_steps=100, seconds_left=3723.4)
    assert line.endswith("0.5 s  loss scale 65536  SKIPPED, 3 so far  1:02:03 left")


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    for _ in range(2):
        train(Logger(tmp_path, console=False), num_steps=1)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 1]


def test_tensorboard_has_every_figure_of_every_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(Logger(tmp_path, console=False, tensorboard=True, peak_flops=1e6))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(line["step"], pytest.approx(line["loss"])) for line in lines_of(tmp_path)]
    assert losses == expected
    wanted = {"grad_norm", "lr", "mfu", "tokens_per_second_per_rank_10", "num_consumed_tokens"}
    assert {f"train/{name}" for name in wanted} <= set(events.Tags()["scalars"])


class Evaluated(Logger):
    def on_step_end(self, trainer: Trainer, metrics: StepMetrics) -> None:
        self.log("valid/en", metrics.step, {"loss": 1.5, "perplexity": math.inf})


def test_other_figures_go_the_same_ways(tmp_path: Path) -> None:
    text, console = screen()
    train(Evaluated(tmp_path, console=console), num_steps=1)
    assert text.getvalue() == "step 1  valid/en  loss 1.5  perplexity inf\n"
    (line,) = lines_of(tmp_path)
    assert line.pop("time") > 0
    assert line == {"step": 1, "group": "valid/en", "loss": 1.5, "perplexity": None}


def log_on_all_ranks(rank: int, folder: Path) -> str:
    text, console = screen()
    train(Evaluated(folder / str(rank), console=console), plan=Plan(pp=2, num_microbatches=2))
    return text.getvalue()


def test_only_rank_0_writes(world2: World, tmp_path: Path) -> None:
    first, second = world2.run(log_on_all_ranks, tmp_path)
    assert first
    assert not second
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_tensorboard_without_a_folder_is_refused() -> None:
    with pytest.raises(IlmCompileError, match="tensorboard needs a folder"):
        Logger(tensorboard=True)


def test_tensorboard_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(IlmCompileError, match="pip install tensorboard"):
        Logger(tmp_path, tensorboard=True)


class Failing:
    """A recorder that can do nothing after its first figures."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, folder: Path | None, step: int) -> None:
        self.calls.append(f"start {step}")

    def record(self, group: str, step: int, values: Any) -> None:
        self.calls.append(f"{group} {step}")
        if step == 2:
            raise OSError("no room")

    def close(self) -> None:
        self.calls.append("close")


def test_a_recorder_that_fails_is_told_of_once_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing()
    train(Logger(tmp_path, console=False, recorders=[failing]), num_steps=4)
    assert failing.calls == ["start 0", "train 1", "train 2", "close"]
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4]
    assert caplog.messages == ["Failing fails (OSError: no room); training goes on without it"]


def test_a_full_disk_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    train(Logger(tmp_path, console=False))
    [message] = caplog.messages
    assert message.startswith("JsonLines fails (OSError: ")
    assert message.endswith("training goes on without it until it works again")


def test_lines_go_on_whole_after_one_was_cut_off(tmp_path: Path) -> None:
    lines = Steady(JsonLines())
    lines.start(tmp_path, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "dumps", lambda _: "\udc80")  # cannot be encoded
        lines.record("train", 1, {"loss": 1.0})
    lines.record("train", 2, {"loss": 2.0})
    lines.close()
    assert [line["step"] for line in map(json.loads, filter(None, text_of(tmp_path)))] == [2]


def text_of(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_weights_and_biases_gets_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", MagicMock(init=run.init))
    run.init.return_value = run
    train(Logger(tmp_path, console=False, recorders=[WeightsAndBiases("mine", "a job", {"x": 1})]))
    run.init.assert_called_once_with(
        project="mine", name="a job", config={"x": 1}, dir=str(tmp_path), id="a-job", resume="allow"
    )
    logged = [call.args[0] for call in run.log.call_args_list]
    assert [(each["step"], each["train/loss"]) for each in logged] == [
        (line["step"], line["loss"]) for line in lines_of(tmp_path)
    ]
    run.finish.assert_called_once_with()


def test_weights_and_biases_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(IlmCompileError, match="pip install wandb"):
        WeightsAndBiases("mine", "a job")

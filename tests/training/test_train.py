"""A training from a config: the functions by hand, the command, two processes, resuming."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import ilm_compile
from ilm_compile import ParallelMode, ProcessGroups
from ilm_compile.cli import main
from ilm_compile.config import Config, load_config
from ilm_compile.models import MODEL_INITIALIZER
from ilm_compile.runtime.data import write_shard
from ilm_compile.training import agreement, hooks
from ilm_compile.training.optimizer import loss_scaler
from ilm_compile.training.trainer import set_torch_flags
from tests.support.world import World
from tests.training.jobs import losses, metrics, tiny, train_on


def by_hand(config: Config) -> list[float]:
    """The steps of InternLM's training page, one by one."""
    parallel = ilm_compile.initialize_model(config)
    optimizer, beta2_scheduler, lr_scheduler = ilm_compile.initialize_optimizer(config, parallel)
    batches = ilm_compile.get_train_data_loader(config)
    trainer = ilm_compile.initialize_trainer(
        config,
        parallel,
        optimizer,
        beta2_scheduler=beta2_scheduler,
        lr_scheduler=lr_scheduler,
    )
    trainer.train()
    found = []
    for _ in range(config.train.total_steps):
        trainer.zero_grad()
        _, _, loss = trainer.execute_schedule(next(batches), return_output_label=True)
        trainer.step()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """The tiny job, trained in this process."""
    folder = tmp_path_factory.mktemp("one")
    config = tiny(folder)
    train_on(0, config)
    return folder, config


def test_the_whole_job_takes_the_steps_of_the_training_page(
    one: tuple[Path, Config], tmp_path: Path
) -> None:
    folder, config = one
    assert losses(folder) == by_hand(config)
    assert losses(folder)[-1] < losses(folder)[0] - 0.1


def test_a_run_keeps_its_config(one: tuple[Path, Config]) -> None:
    folder, config = one
    assert load_config(folder / "tiny" / "config.toml") == config
    manifest = folder / "tiny" / "checkpoints" / "step-00000004" / "manifest.json"
    assert json.loads(manifest.read_text())["body"]["config"]["train"]["total_steps"] == 4


def test_the_learning_rate_follows_the_schedulers(one: tuple[Path, Config]) -> None:
    rates = [line["lr"] for line in metrics(one[0])]
    cosine = [1e-3 + 9e-3 * (1 + math.cos(math.pi * u / 3)) / 2 for u in (1, 2, 3)]
    assert rates == pytest.approx([1e-2, *cosine])


def test_two_ranks_train_as_one_and_another_plan_goes_on(
    one: tuple[Path, Config], world2: World, tmp_path: Path
) -> None:
    first = tiny(tmp_path, "parallel.tensor=2")
    assert world2.run(train_on, first) == [(4, None), (4, None)]
    assert losses(tmp_path) == pytest.approx(losses(one[0]), rel=1e-5)
    more = ("train.total_steps=6", "lr_scheduler.total_steps=4")
    train_on(0, tiny(one[0], *more))
    world2.run(train_on, tiny(tmp_path, "parallel.pipeline=2", *more))
    assert len(losses(tmp_path)) == 6
    assert losses(tmp_path) == pytest.approx(losses(one[0]), rel=1e-5)


def test_a_finished_run_is_left_alone(one: tuple[Path, Config]) -> None:
    before = (one[0] / "tiny" / "metrics.jsonl").read_text()
    assert ilm_compile.train(one[1]).num_steps >= 4
    assert (one[0] / "tiny" / "metrics.jsonl").read_text() == before


def kinds_on(rank: int, config: Config) -> dict[str, Any]:
    groups = ProcessGroups(ilm_compile.initialize_model(config).mesh)
    assert groups.get_global_rank() == rank
    assert groups.is_rank_for_log() is (rank == 0)
    assert groups.is_pipeline_first_stage() is (rank == 0)
    assert groups.is_pipeline_last_stage() is (rank == 1)
    return {
        mode.name: (
            groups.get_ranks_in_group(mode),
            groups.get_local_rank(mode),
            groups.get_world_size(mode),
            torch.distributed.get_process_group_ranks(groups.get_group(mode)),
        )
        for mode in ParallelMode
    }


def test_groups_are_known_by_kind(world2: World, tmp_path: Path) -> None:
    both, alone = ([0, 1], 1, 2, [0, 1]), ([1], 0, 1, [1])
    assert world2.run(kinds_on, tiny(tmp_path, "parallel.pipeline=2"))[1] == {
        "GLOBAL": both, "PIPELINE": both, "TENSOR": alone, "DATA": alone, "ZERO1": alone,
        "EXPERT": alone, "EXPERT_DATA": alone,
    }  # fmt: skip


def refusal(rank: int, config: Config, differs: str) -> str:
    """What a rank is told that was started with another config or other code than rank 0."""
    digest = agreement.code_digest
    if differs == "config":
        config = replace(config, job_name=f"job{rank}")
    else:
        agreement.code_digest = lambda: bytes([rank])
    try:
        train_on(rank, config)
    except ilm_compile.IlmCompileError as error:
        return str(error)
    finally:
        agreement.code_digest = digest
    return "no refusal"


@pytest.mark.parametrize("what", ["config", "code"])
def test_ranks_that_differ_do_not_start(what: str, world2: World, tmp_path: Path) -> None:
    for told in world2.run(refusal, tiny(tmp_path), what):
        assert f"expected the same {what}" in told
        assert "ranks [1] differ from rank 0" in told


# data


def test_token_files_with_validation_sets(tmp_path: Path) -> None:
    for name in ("train/en", "valid/en", "valid/code"):
        (tmp_path / name).mkdir(parents=True)
        write_shard(tmp_path / name / "a.bin", [[5, 6, 7, 8] * 10] * 30)
    config = tiny(
        tmp_path,
        data={
            "type": "tokenized",
            "train_folder": str(tmp_path / "train"),
            "valid_folder": str(tmp_path / "valid"),
            "valid_every": 2,
            "min_length_dict": {"en": 3},
        },
    )
    train_on(0, config)
    lines = [line for line in metrics(tmp_path) if "group" in line]
    told = [(line["step"], line["group"]) for line in lines]
    assert told == [(step, f"valid/{name}") for step in (2, 4) for name in ("code", "en")]
    assert lines[-1]["loss"] < lines[0]["loss"]
    # the last token of each of 30 documents has none to learn; rows of 32 cut on, not off
    assert lines[0]["num_tokens"] == 30 * 39


@pytest.mark.parametrize(
    "data",
    [
        {"type": "random"},
        {"type": "tokenized"},
        {"type": "random", "packing": "window"},
        {"type": "random", "skip_batches": "0", "rampup_batch_size": "1 1 2"},
        {"type": "random", "num_worker": 1},
    ],
    ids=["random", "no folder", "window", "ramp", "ahead"],
)
def test_every_kind_of_data_trains(data: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(tmp_path, "train.total_steps=1", "lr_scheduler.total_steps=4", data=data)
    train_on(0, config)
    assert math.isfinite(losses(tmp_path)[0])


# model, loss, numbers


def test_label_smoothing_is_in_the_loss(tmp_path: Path) -> None:
    config = tiny(tmp_path, "loss.label_smoothing=0.25", "data.micro_num=1")
    parallel = ilm_compile.initialize_model(config)
    batch = next(ilm_compile.get_train_data_loader(config))
    model = MODEL_INITIALIZER.get_module("INTERNLM2")(**config.model_fields())
    logits = model(**{name: value for name, value in batch.items() if name != "labels"})
    expected = F.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.25
    )
    assert parallel.execute_schedule(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_float16_trains_under_the_loss_scale_of_the_config(tmp_path: Path) -> None:
    options = {
        "initial_scale": 512.0, "min_scale": 4.0, "max_scale": 2048.0, "growth_interval": 2,
        "growth_factor": 4.0, "backoff_factor": 0.25, "hysteresis": 1,
    }  # fmt: skip
    config = tiny(tmp_path, "train.dtype=float16", grad_scaler=options)
    scaler = loss_scaler(config)
    assert scaler is not None
    assert {name: getattr(scaler, name) for name in options if name != "initial_scale"} == {
        name: value for name, value in options.items() if name != "initial_scale"
    }
    train_on(0, config)
    assert [line["loss_scale"] for line in metrics(tmp_path)] == [512, 512, 2048, 2048]
    assert loss_scaler(tiny(tmp_path, "train.dtype=bfloat16")) is None


def test_a_run_may_start_from_weights(tmp_path: Path) -> None:
    config = tiny(tmp_path, "data.micro_num=1", "train.total_steps=2")
    model = MODEL_INITIALIZER.get_module("INTERNLM2")(**config.model_fields())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    weights = tmp_path / "half.safetensors"
    save_file(model.bfloat16().state_dict(), weights)
    loss = model.float()(**next(ilm_compile.get_train_data_loader(config)))
    train_on(0, tiny(tmp_path, "data.micro_num=1", "train.total_steps=2", ckpt={
        "load_path": f"local:{weights}", "load_format": "ilm", "enabled": False,
    }))  # fmt: skip
    assert losses(tmp_path)[0] == pytest.approx(loss.item(), rel=1e-6)
    assert not (tmp_path / "tiny" / "checkpoints" / "step-00000002").exists()


def test_a_run_may_start_from_another_run_s_checkpoint(
    one: tuple[Path, Config], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = one
    source = str(folder / "tiny" / "checkpoints" / "step-00000004")
    load = {"load_path": source, "load_content": ["model"]}
    train_on(0, tiny(folder, "job_name=next", ckpt=load))
    assert losses(folder, "next")[0] < losses(folder)[1]
    train_on(0, tiny(folder, "job_name=next", "logging.console=true", ckpt=load))
    assert "resumed after step 4 from" in capsys.readouterr().out


def test_a_model_of_the_user_is_trained(tmp_path: Path) -> None:
    class Bigram(nn.Module):
        def __init__(self, vocab_size: int) -> None:
            super().__init__()
            self.table = nn.Embedding(vocab_size, vocab_size)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(self.table(input_ids).flatten(0, 1), labels.flatten())

        def initial_parameter(self, name: str, **options: Any) -> torch.Tensor:
            return torch.zeros_like(self.table.weight, device="cpu")

    if not MODEL_INITIALIZER.has("TEST_BIGRAM"):
        MODEL_INITIALIZER.register_module(module_name="TEST_BIGRAM")(Bigram)
    config = tiny(tmp_path)
    values = config.to_dict() | {"model": {"type": "TEST_BIGRAM", "vocab_size": 260}}
    train_on(0, ilm_compile.make_config(values))
    assert losses(tmp_path)[0] == pytest.approx(math.log(260), rel=1e-5)


@pytest.mark.parametrize("is_set", [False, True])
def test_options_of_numbers_reach_torch(
    is_set: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: found.update(det=on))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda p: found.update(tf32=p))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not is_set)
    flags = {"deterministic": is_set, "tf32": is_set, "cudnn_benchmark": is_set}
    set_torch_flags(tiny(tmp_path, train=flags))
    assert found == {"det": is_set, "tf32": "high" if is_set else "highest"}
    assert torch.backends.cudnn.benchmark is is_set


# what watches


def test_profiling_leaves_traces_memory_and_timeline(tmp_path: Path) -> None:
    options = {"enabled": True, "first_step": 2, "num_steps": 1}
    config = tiny(tmp_path, profiler=options, logging={"tensorboard": True})
    train_on(0, config)
    folder = tmp_path / "tiny"
    assert {path.name for path in (folder / "profile").iterdir()} == {
        "trace-steps-2-2-rank-0.json", "memory-rank-0.html", "pipeline-step-3.svg",
    }  # fmt: skip
    assert list((folder / "tensorboard").iterdir())


def test_the_monitor_has_the_limits_of_the_config(tmp_path: Path) -> None:
    options = {
        "webhook": "env:TEST_WEBHOOK", "webhook_kind": "slack", "command": ["true", "-x"],
        "stuck_s": 0, "loss_spike_ratio": 3.0, "slow_rank_ratio": 0, "slow_rank_every": 7,
        "min_free_gib": 0.5, "grace_s": 9.0,
    }  # fmt: skip
    made: dict[str, Any] = {}
    config = tiny(tmp_path, monitor=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEST_WEBHOOK", "https://hooks.example/x")
        patch.setattr(hooks, "Monitor", lambda **keywords: made.update(keywords))
        hooks.make_monitor(config)
    sinks = [repr(sink) for sink in made.pop("sinks")]
    assert sinks == ["Webhook to hooks.example", "command true"]
    assert made == {
        "job": "tiny", "stuck_after_s": None, "spike_ratio": 3.0, "slow_ratio": None,
        "slow_every": 7, "folder": tmp_path / "tiny" / "monitor", "min_free_bytes": 2**29,
        "grace_s": 9.0,
    }  # fmt: skip


# the command


def test_the_command_tells_what_has_no_effect_and_how_it_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.toml"
    tiny(tmp_path, "train.total_steps=1").save(path)
    text = (
        path.read_text()
        .replace("[train]", "[train]\n")
        .replace("[optimizer]", "[hybrid_zero_optimizer]\nreduce_bucket_size = 1\n[optimizer]")
    )
    path.write_text(text)
    arguments = ["train", "--config", str(path), "--set", "lr_scheduler.total_steps=4"]
    assert main(arguments) == 0
    told = capsys.readouterr()
    assert "reduce_bucket_size has no effect: gradients are reduced by block" in told.err
    assert told.out.endswith(f"finished after step 1 of 1; see {tmp_path / 'tiny'}\n")


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(("local_rank", "waits"), [(0, []), (1, [5.0])])
def test_a_bad_start_is_told_by_the_first_rank_of_a_node_before_the_others(
    command: str,
    local_rank: int,
    waits: list[float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"WORLD_SIZE": 3, "RANK": local_rank, "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(name, str(value))
    tiny(tmp_path, "parallel.tensor=2").save(tmp_path / "tiny.toml")
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert main([command, "--config", str(tmp_path / "tiny.toml")]) == 1
    assert "expected a multiple of parallel.tensor" in capsys.readouterr().err
    assert waited == waits


def test_sigterm_saves_and_ends_well(tmp_path: Path) -> None:
    config = tiny(tmp_path, "train.total_steps=100000", "ckpt.every=0", "logging.console=true")
    config.save(tmp_path / "tiny.toml")
    command = [sys.executable, "-m", "ilm_compile.cli", "train", "--config"]
    with subprocess.Popen(
        [*command, str(tmp_path / "tiny.toml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        guard = threading.Timer(90, process.kill)
        guard.start()
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        guard.cancel()
    assert process.returncode == 0, "".join(lines) + rest
    last = len(losses(tmp_path))
    assert f"stopped (SIGTERM) after step {last} of 100000" in rest
    assert (tmp_path / "tiny" / "checkpoints" / f"step-{last:08d}" / "manifest.json").exists()

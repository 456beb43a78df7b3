"""A run that goes on under other settings: the model's are refused, the others applied and told."""

import contextlib
import io
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

import ilm_compile
from ilm_compile import train
from ilm_compile.config import Config
from ilm_compile.runtime.checkpoint import CheckpointError
from tests.support.world import World
from tests.training.jobs import losses, metrics, tiny, train_on

SHORT = {"data": {"type": "random"}, "train": {"total_steps": 2}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a checkpoint of two steps, which other runs start from."""
    folder = tmp_path_factory.mktemp("saved")
    train_on(0, tiny(folder, **SHORT))
    return folder / "tiny" / "checkpoints" / "step-00000002"


def going_on(folder: Path, saved: Path, *overrides: str, **sections: dict[str, Any]) -> Config:
    """A job that goes on with all of `saved`, for two more steps."""
    start = {"load_path": str(saved), "load_content": ["all"], **sections.pop("ckpt", {})}
    train = {"total_steps": 4, **sections.pop("train", {})}
    data = {"type": "random", **sections.pop("data", {})}
    return tiny(folder, *overrides, ckpt=start, train=train, data=data, **sections)


MODEL = {
    "heads": ({"num_attention_heads": 8, "num_kv_attention_heads": 4}, "4 -> 8.*2 -> 4"),
    "rope": ({"rope_base": 1e4}, "model.rope_base: 1e\\+06 -> 10000"),
    "epsilon": ({"layer_norm_epsilon": 1e-3}, "model.layer_norm_epsilon: 1e-05 -> 0.001"),
    "width": ({"mlp_ratio": 8.5}, "model.mlp_ratio: 2 -> 8.5"),
}


@pytest.mark.parametrize("case", MODEL)
def test_another_model_is_refused_by_its_keys(tmp_path: Path, saved: Path, case: str) -> None:
    fields, message = MODEL[case]
    with pytest.raises(CheckpointError, match=f"another model.*{message}.*ckpt.allow_change = "):
        train_on(0, going_on(tmp_path, saved, model=fields))
    assert not (tmp_path / "tiny" / "config.toml").exists()


def test_another_model_is_taken_where_its_key_is_named(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    allowed = {"allow_change": ["model.rope_base"]}
    config = going_on(tmp_path, saved, model={"rope_base": 1e4}, ckpt=allowed)
    assert train_on(0, config)[0] == 4
    assert "changed: model.rope_base: 1e+06 -> 10000\n" in capsys.readouterr().out
    # what it saves is of the new model
    again = tiny(tmp_path, **{**SHORT, "train": {"total_steps": 4}}, model={"rope_base": 1e4})
    assert train_on(0, again) == (4, None)


def test_an_unknown_key_cannot_be_allowed(tmp_path: Path) -> None:
    with pytest.raises(ilm_compile.IlmCompileError, match=r"'model\.rope' is no key of the model"):
        tiny(tmp_path, ckpt={"allow_change": ["model.rope"]})


TRAINING = {
    "dtype": ("train.dtype=bfloat16", "train.dtype: float32 -> bfloat16"),
    "scaled": ("train.dtype=float16", "train.dtype: float32 -> float16"),
    "smoothing": ("loss.label_smoothing=0.1", "loss.label_smoothing: 0 -> 0.1"),
    "clipping": ("train.max_grad_norm=0.5", "train.max_grad_norm: 1 -> 0.5"),
    "batch": ("data.micro_num=4", "data.micro_num: 2 -> 4"),
    "gradient": ("model.embed_grad_scale=0.5", "model.embed_grad_scale: 1 -> 0.5"),
    "beta2": ("beta2_scheduler.c=0.8", "beta2_scheduler.c: 0 -> 0.8"),
}


@pytest.mark.filterwarnings("ignore:.*the loss scale starts anew")
@pytest.mark.parametrize("case", TRAINING)
def test_another_training_is_told(
    tmp_path: Path, saved: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    override, message = TRAINING[case]
    assert train_on(0, going_on(tmp_path, saved, override)) == (4, None)
    told = capsys.readouterr().out.splitlines()
    assert told == ["changed: train.total_steps: 2 -> 4", f"changed: {message}"] or told == [
        f"changed: {message}", "changed: train.total_steps: 2 -> 4",
    ]  # fmt: skip


def told_on(rank: int, config: Config) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        train_on(rank, config)
    return out.getvalue()


def test_another_number_of_data_parallel_ranks_is_told_by_the_rows_of_a_step(
    tmp_path: Path, saved: Path, world2: World
) -> None:
    told = world2.run(told_on, going_on(tmp_path, saved, "train.total_steps=2"))
    assert told == ["changed: rows of a step: 2 -> 4\n", ""]


def test_what_changes_nothing_is_not_told(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"attn_wqkv_init_std": 0.5, "type": "INTERNLM2_PUBLIC"}
    config = going_on(tmp_path, saved, "monitor.stuck_s=9", "train.total_steps=2", model=other)
    assert train_on(0, config) == (2, None)
    assert capsys.readouterr().out == ""


def test_the_optimizer_and_its_schedules_are_those_of_the_config(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates of the new shape at the step where it stands, not the old rate in it."""
    seen = []
    step = torch.optim.AdamW.step

    def noting(self: torch.optim.AdamW, *arguments: Any) -> Any:
        seen.append({key: self.param_groups[0][key] for key in ("weight_decay", "betas", "eps")})
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    optimizer = {"lr": 1e-3, "weight_decay": 0.5, "beta1": 0.5, "beta2": 0.7, "eps": 1e-4}
    schedule = {"total_steps": 8, "warmup_ratio": 0.5, "eta_min": 0.0}
    train_on(0, going_on(tmp_path, saved, optimizer=optimizer, lr_scheduler=schedule))
    assert [line["lr"] for line in metrics(tmp_path)] == pytest.approx([7.5e-4, 1e-3])
    assert seen == [{"weight_decay": 0.5, "betas": (0.5, 0.7), "eps": 1e-4}] * 2
    assert len(losses(tmp_path)) == 2


def test_a_run_that_is_started_again_takes_the_config_it_is_given_now(
    tmp_path: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its own newest checkpoint, not from ckpt.load_path."""
    shutil.copytree(saved.parents[1], tmp_path / "tiny")
    longer = {**SHORT, "train": {"total_steps": 4}}
    with pytest.raises(CheckpointError, match=r"model.rope_base: 1e\+06 -> 10000"):
        train_on(0, tiny(tmp_path, **longer, model={"rope_base": 1e4}))
    kept = tomllib.loads((tmp_path / "tiny" / "config.toml").read_text())
    assert (kept["model"]["rope_base"], kept["train"]["total_steps"]) == (1e6, 2)
    trainer = train(tiny(tmp_path, "optimizer.weight_decay=0.5", **longer))
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5
    told = capsys.readouterr().out
    assert "changed: optimizer.weight_decay: 0.1 -> 0.5\n" in told

"""What a .py config means by the keys that it leaves out: what they mean there, or a line."""

from pathlib import Path
from typing import Any

import pytest

from ilm_compile.config import Config, load_config

SIZES = "num_layers=2, hidden_size=64, vocab_size=512, num_attention_heads=4"
TEXT = """
JOB_NAME = "t"
{top}
data = dict(seq_len=32, total_steps=9{data})
model = dict({model})
adam = dict(lr=1e-4)
"""


def theirs(
    folder: Path, *overrides: str, top: str = "", data: str = "", model: str = SIZES
) -> Config:
    path = folder / "c.py"
    path.write_text(TEXT.format(top=top, data=data, model=model))
    return load_config(path, overrides)


def line(config: Config, start: str) -> list[str]:
    return [notice for notice in config.notices if start in notice]


def test_what_is_left_out_is_as_internevo_has_it(tmp_path: Path) -> None:
    config = theirs(tmp_path)
    assert config.model.type == "INTERNLM"
    assert (config.train.dtype, config.train.max_grad_norm) == ("float16", 0.0)
    assert (config.lr_scheduler.warmup_ratio, config.lr_scheduler.eta_min) == (0.0, 0.0)
    assert config.model.fields["mlp_ratio"] == 4.0
    assert config.model.fields["embed_grad_scale"] == 0.1
    assert line(config, "left out, so as InternEvo has it: model_type='INTERNLM', train.dtype=")


def test_what_is_always_so_there_is_so_here(tmp_path: Path) -> None:
    config = theirs(tmp_path)
    assert config.optimizer.decay_all
    assert config.lr_scheduler.hold_peak
    assert not config.data.zero_is_target
    assert not config.data.learn_ends
    assert config.ckpt.keep_every == 1


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("INTERNLM2_PUBLIC", {"rope_base": 10000.0, "no_bias": False, "adapt_hf": True}),
        ("INTERNLM3", {"rope_base": 10000.0, "no_bias": False, "adapt_hf": True}),
        ("LLAMA2", {"rope_base": 10000.0, "no_bias": False, "adapt_hf": False}),
        ("LLAMA", {"num_kv_attention_heads": 4, "mlp_ratio": 4.0}),
    ],
)
def test_defaults_are_those_of_the_type(
    tmp_path: Path, model_type: str, expected: dict[str, Any]
) -> None:
    fields = theirs(tmp_path, top=f"model_type = {model_type!r}").model.fields
    assert {name: fields[name] for name in expected} == expected


def test_what_is_given_stays_and_the_command_line_wins(tmp_path: Path) -> None:
    config = theirs(
        tmp_path,
        "optimizer.decay_all=false",
        "data.zero_is_target=true",
        top="hybrid_zero_optimizer = dict(clip_grad_norm=2.0)\nmodel_type = 'INTERNLM'",
        model=f"{SIZES}, dtype='torch.bfloat16', mlp_ratio=2.0",
    )
    assert (config.train.dtype, config.train.max_grad_norm) == ("bfloat16", 2.0)
    assert config.model.fields["mlp_ratio"] == 2.0
    assert (config.optimizer.decay_all, config.data.zero_is_target) == (False, True)
    assert not line(config, "model_type")


def test_a_saved_config_means_the_same_without_the_file(tmp_path: Path) -> None:
    config = theirs(tmp_path)
    config.save(tmp_path / "saved.toml")
    assert load_config(tmp_path / "saved.toml") == config


def test_a_toml_file_has_our_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        "model_type = 'INTERNLM'\n[model]\nnum_layers=2\nhidden_size=64\nvocab_size=512\n"
        "num_attention_heads=4\n[data]\nseq_len=32\ntotal_steps=9\n"
    )
    config = load_config(path)
    assert (config.train.dtype, config.optimizer.decay_all) == ("float32", False)


@pytest.mark.parametrize(
    ("data", "override", "one_row"),
    [
        (", micro_bsz=2", "", True),
        (", micro_bsz=2", "data.one_row=false", False),
        (", micro_bsz=2, pack_sample_into_one=True", "", False),
        (", micro_bsz=2", "data.type=pydoc", False),
    ],
)
def test_documents_lie_in_one_row_of_a_micro_batch(
    tmp_path: Path, data: str, override: str, one_row: bool
) -> None:
    config = theirs(tmp_path, *([override] if override else []), data=data)
    assert (config.data.rows, config.data.row_tokens) == ((1, 64) if one_row else (2, 32))


def test_the_mean_of_the_loss_is_told_of(tmp_path: Path) -> None:
    assert line(theirs(tmp_path), "the loss is the mean over all targets")


@pytest.mark.parametrize("top", ["", "enable_tb = True"])
def test_tensorboard_is_told_of_unless_it_is_on(tmp_path: Path, top: str) -> None:
    config = theirs(tmp_path, top=top)
    assert bool(line(config, "no TensorBoard files")) is not config.logging.tensorboard

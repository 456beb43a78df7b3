"""Configs as a whole: keys, types, ranges, InternEvo's keys, --set, and the saved config."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ilm_compile.config import ConfigError, load_config, make_config
from ilm_compile.config.schema import SECTIONS
from ilm_compile.models import MODEL_INITIALIZER
from ilm_compile.program.plan import Plan
from tests.config.made import SMALL, config, fault

SAMPLES = Path(__file__).parent / "samples"


def test_a_toml_file_gives_every_section(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        'job_name = "small"\n[model]\ntype = "INTERNLM"\nnum_layers = 2\nhidden_size = 64\n'
        "vocab_size = 512\nnum_attention_heads = 4\n[train]\ntotal_steps = 100\n"
        '[data]\nseq_len = 32\ntype = "random"\nmicro_num = 4\n'
        "[parallel]\npipeline = 2\nnum_chunks = 2\nconstraints = {'norm.weight' = 'I'}\n"
    )
    loaded = load_config(path)
    assert loaded.model_fields()["hidden_size"] == 64
    assert (loaded.model_fields()["max_seq_len"], loaded.model_fields()["seed"]) == (32, 1024)
    plan = loaded.plan()
    assert (plan.pp, plan.num_chunks, plan.num_microbatches) == (2, 2, 4)
    assert (plan.schedule, plan.constraints) == ("interleaved_1f1b", (("norm.weight", "I"),))


@pytest.mark.parametrize("name", ["7B_sft.py", "7B_internlm2.py"])
def test_a_resolved_config_is_saved_and_loads_to_an_equal_one(name: str, tmp_path: Path) -> None:
    loaded = load_config(SAMPLES / name)
    loaded.save(tmp_path / "runs" / "config.toml")
    assert load_config(tmp_path / "runs" / "config.toml") == loaded
    assert make_config(loaded.to_dict()) == loaded
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["config.toml"]


def test_every_field_of_a_plan_follows_from_the_config() -> None:
    sections: dict[str, Any] = {
        "train": {"total_steps": 9, "dtype": "float16", "kernels": "torch", "seed": 3,
                  "compile": "aot_eager"},
        "data": {"seq_len": 32, "micro_num": 4},
        "parallel": {
            "tensor": 2, "pipeline": 2, "num_chunks": 2, "zero": 3, "sequence_parallel": True,
            "async_tensor_parallel": True, "embed_split_hidden": False, "checkpoint": 0.5,
            "constraints": {"a": "S(0)"},
        },
    }  # fmt: skip
    plan = config(**sections).plan()
    assert plan == Plan(
        tp=2, pp=2, num_chunks=2, num_microbatches=4, schedule="interleaved_1f1b",
        sequence_parallel=True, async_tensor_parallel=True, embed_split_hidden=False,
        constraints=(("a", "S(0)"),),
        checkpoint=0.5, dtype="float16", zero=3, kernels="torch", seed=3, compile="aot_eager",
    )  # fmt: skip
    sections["parallel"]["schedule"] = "gpipe"
    assert config(**sections).plan().schedule == "gpipe"


def test_odd_text_survives_saving(tmp_path: Path) -> None:
    odd = 'a "b" \\ \x7f \n é'
    loaded = config(monitor={"webhook": odd}, data={"min_length_dict": {"c++": 1, "a.b": 2}})
    loaded.save(tmp_path / "c.toml")
    assert load_config(tmp_path / "c.toml") == loaded


def test_the_sample_of_internlm_7b_means_what_internevo_means_by_it() -> None:
    loaded = load_config(SAMPLES / "7B_sft.py")
    assert loaded.job_name == "7b_train"
    assert loaded.model.fields["mlp_ratio"] == 8 / 3
    assert loaded.plan().dtype == "bfloat16"
    assert (loaded.plan().num_microbatches, loaded.plan().sequence_parallel) == (4, False)
    assert (loaded.optimizer.weight_decay, loaded.train.max_grad_norm) == (0.01, 1.0)
    assert (loaded.ckpt.enabled, loaded.ckpt.load_format) == (False, "internlm")
    assert loaded.monitor.slow_rank_every == 200


def test_the_sample_with_bases_takes_its_own_values_over_theirs() -> None:
    loaded = load_config(SAMPLES / "7B_internlm2.py")
    assert loaded.job_name == "internlm2_128x032"
    assert (loaded.model.fields["hidden_size"], loaded.model.fields["adapt_hf"]) == (4096, False)
    plan = loaded.plan()
    assert (plan.tp, plan.pp, plan.sequence_parallel, plan.checkpoint) == (2, 2, True, 0.33)
    assert loaded.ckpt.folder == "local:internlm2_128x032/ckpts"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"paralel": {"tensor": 2}}, "paralel is not a key; did you mean parallel?"),
        ({"parallel": {"tensr": 2}}, "parallel.tensr is not a key; did you mean parallel.tensor?"),
        ({"ckpt": {"checkpoint_evry": 2}}, "did you mean ckpt.checkpoint_every?"),
        ({"adam": {"adam_beta3": 2}}, "adam.adam_beta3 is not a key; did you mean adam.adam_beta"),
        ({"parallel": {"tensor": {"sizes": 2}}}, "did you mean parallel.tensor.size?"),
        ({"model": {"hiden_size": 2}}, "model.hiden_size is not a key; did you mean model.hidden"),
        ({"model": {"seed": 2}}, "model.seed is not a key; write train.seed"),
        ({"model": {"type": "GPT"}}, "unknown type 'GPT', expected one of BAICHUAN2, HF, INTERNLM"),
        ({"model": {"num_layers": "2"}}, "model.num_layers: expected an integer, got '2'"),
        ({"model": {"hidden_size": 63}}, "must be a multiple of num_attention_heads=4"),
        ({"train": {"total_steps": 5e4}}, "train.total_steps: expected an integer, got 50000.0"),
        ({"train": {"total_steps": 0}}, "train.total_steps: expected at least 1, got 0"),
        ({"train": {"dtype": "bfloat61"}}, "(did you mean 'bfloat16'?)"),
        ({"train": 3}, "train: expected a table, got 3"),
        ({"parallel": {"tensor": True}}, "parallel.tensor: expected an integer, got True"),
        ({"parallel": {"zero": 2}}, "parallel.zero: expected one of 1, 3, got 2"),
        ({"parallel": {"checkpoint": 1.5}}, "parallel.checkpoint: expected at most 1, got 1.5"),
        ({"parallel": {"constraints": {"a": 1}}}, "a table, each value text"),
        ({"parallel": {"constraints": {"a": "P"}}}, "a parameter is I (replicated) or S(dim)"),
        ({"parallel": {"num_chunks": 2}}, "num_chunks=2 needs pp > 1"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: expected a finite number, got nan"),
        ({"optimizer": {"lr": 0.0}}, "optimizer.lr: expected more than 0"),
        ({"optimizer": {"lr": 1e-6}}, "lr_scheduler.eta_min: 1e-05 is above optimizer.lr=1e-06"),
        ({"lr_scheduler": {"init_steps": 99}}, "leave nothing of the 100 steps"),
        ({"grad_scaler": {"min_scale": 1e9}}, "does not lie between min_scale=1e+09"),
        ({"data": {"type": "bin"}}, "data.type: expected one of 'tokenized', 'text'"),
        ({"data": {"type": "text"}}, "data.train_folder: data.type='text' needs a folder"),
        ({"data": {"train_folder": "x"}}, "data.type='random' reads no files"),
        ({"data": {"min_length_dict": {"en": -1}}}, "lengths must be 0 or more"),
        ({"data": {"type": "pydoc"}, "model": {"vocab_size": 100}}, "needs 258 for bytes"),
        ({"ckpt": {"load_content": ["weights"]}}, "load_content: expected one of 'model'"),
        ({"ckpt": {"load_content": []}}, "expected at least one"),
        (
            {"ckpt": {"load_content": ["all"], "load_format": "hf"}},
            "load_format='hf' holds the weights alone",
        ),
        ({"data": {"type": "pydoc", "packing": "whole"}}, "is packed by 'cut'"),
        ({"monitor": {"slow_rank_ratio": 1.0}}, "expected more than 1, or 0 for off; got 1"),
        ({"profiler": {"every": 1}}, "expected at least profiler.num_steps=2, got 1"),
        ({"data": {"packing": "window", "max_documents": 4}}, "hold one text; leave it out"),
        ({"data": {"packing": "window", "one_row": True}}, "is for token files with packing='cut'"),
        ({"job_name": "../x"}, "job_name: expected letters, digits"),
        ({"SPARE": 1}, "SPARE is not a key"),
    ],
)
def test_what_is_wrong_is_named(sections: dict[str, Any], message: str) -> None:
    assert message in fault(**sections)


def test_all_that_is_wrong_is_shown_together_with_its_lines() -> None:
    text = fault(model={"num_layers": 1.5}, train={"sed": 1}, adam={"lr": "x"})
    assert text.startswith("3 problems:")
    for key in ("model.num_layers", "train.sed", "optimizer.lr"):
        assert key in text


def test_a_problem_names_the_line_of_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        '[model] # of\ntype = "INTERNLM"\nx = """\nnum_layers = 9\n"""\nnum_layers = "2"\n'
        "[ data ]\nseq_len = 0\n[train]\ntotal_steps = 1\noptimizer.lr = 1\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(path)
    lines = str(error.value).splitlines()
    assert f"  {path}:3: model.x is not a key; expected one of" in "\n".join(lines)
    assert f"  {path}:6: model.num_layers: expected an integer, got '2'" in lines
    assert f"  {path}:8: data.seq_len: expected at least 1, got 0" in lines
    assert f"{path}:11: train.optimizer is not a key" in str(error.value)
    assert f"  {path}:1: model.hidden_size is missing" in lines


def test_a_problem_in_a_base_config_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "base.py").write_text('model_type = "INTERNLM"\nmodel = dict(\n    dtype="x")\n')
    (tmp_path / "main.py").write_text("with read_base():\n    from .base import *\nSTEPS = 3\n")
    with pytest.raises(ConfigError, match=r"base\.py:3: model\.dtype: 'x' is not supported"):
        load_config(tmp_path / "main.py")


def test_a_misspelt_name_of_a_python_file_is_told_from_a_helper(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_text("num_steps = 5\n_a = ANY = 1\nlr_sheduler = dict(total_steps=num_steps)\n")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert "c.py:3: lr_sheduler is not a key; did you mean lr_scheduler?" in str(error.value)
    assert "num_steps is" not in str(error.value)


# --set


@pytest.mark.parametrize(
    ("override", "section", "key", "expected"),
    [
        ("parallel.tensor=4", "parallel", "tensor", 4),
        ("parallel.checkpoint=0.5", "parallel", "checkpoint", 0.5),
        ("parallel.sequence_parallel=true", "parallel", "sequence_parallel", True),
        ("optimizer.lr=1e-3", "optimizer", "lr", 1e-3),
        (
            "ckpt.load_content=['model', 'optimizer']",
            "ckpt",
            "load_content",
            ("model", "optimizer"),
        ),
        ("ckpt.folder=local:a b", "ckpt", "folder", "local:a b"),
        ("ckpt.folder=123", "ckpt", "folder", "123"),
        ("ckpt.folder=none", "ckpt", "folder", None),
        ("ckpt.checkpoint_every=7", "ckpt", "every", 7),
        ("adam.lr=0.5", "optimizer", "lr", 0.5),
        ("data.min_length_dict.en=3", "data", "min_length_dict", {"en": 3}),
        ("parallel.zero1.fsdp=true", "parallel", "zero", 3),
        ("train.dtype=float16", "train", "dtype", "float16"),
        ("train.kernels=torch", "train", "kernels", "torch"),
        ("train.compile=true", "train", "compile", True),
    ],
)
def test_set_wins_over_the_file(override: str, section: str, key: str, expected: object) -> None:
    changed = config(override, optimizer={"lr": 0.1}, ckpt={"folder": "x", "every": 2})
    assert getattr(getattr(changed, section), key) == expected


def test_the_last_of_two_sets_wins() -> None:
    assert config("parallel.tensor=4", "parallel.tensor=2").parallel.tensor == 2


def test_set_reaches_the_model_and_the_top() -> None:
    changed = config("model.num_layers=3", "job_name=42")
    assert (changed.model.fields["num_layers"], changed.job_name) == (3, "42")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.tensor", "--set parallel.tensor: expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("parallel.tensor=x", "--set parallel.tensor=x: parallel.tensor: expected an integer"),
        ("parallel.tenser=2", "did you mean parallel.tensor?"),
        ("parallel=2", "parallel: expected a table, got 2"),
        ("train.total_steps=none", "train.total_steps is missing"),
    ],
)
def test_a_wrong_set_is_named(override: str, message: str) -> None:
    assert message in fault(override)


# models of the user


def test_a_registered_model_takes_the_keys_of_its_builder() -> None:
    @MODEL_INITIALIZER.register_module(module_name="TEST_CONFIG_TINY")
    def build(width: int, names: list[str], num_experts: int = 1) -> nn.Module:
        return nn.Linear(width, len(names) * num_experts)

    fields = {"width": 3, "names": ("a",), "num_experts": 8}  # the last InternEvo's families have
    values = {**SMALL, "model": {"type": "TEST_CONFIG_TINY", **fields}}
    loaded = make_config(values)
    assert loaded.model_fields() == {"width": 3, "names": ["a"], "num_experts": 8}
    assert make_config(loaded.to_dict()) == loaded
    with pytest.raises(ConfigError, match=r"model.widht is not a key; did you mean model.width\?"):
        make_config({**SMALL, "model": {"type": "TEST_CONFIG_TINY", "widht": 3}})


# the schema itself


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_can_be_written_in_toml(name: str) -> None:
    """None cannot: so it must be what leaving the key out means."""
    for item in dataclasses.fields(SECTIONS[name]):
        if "None" in str(item.type):
            assert item.default is None, item.name
        assert item.metadata["help"], item.name

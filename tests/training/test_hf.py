"""`model = { hf = "folder" }` and `data = { type = "chat" }`: a folder in, a folder out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples import finetune_start
from ilm_compile.cli import main
from ilm_compile.config import Config, ConfigError, load_config, make_config
from ilm_compile.errors import IlmCompileError
from ilm_compile.models import hf_causal_lm
from ilm_compile.runtime.checkpoint import CheckpointError
from ilm_compile.training import initialize_model, preflight
from ilm_compile.training.data import get_train_data_loader
from ilm_compile.training.preflight import StartError, check_start
from tests.support.held_out import held_out_loss
from tests.support.world import World
from tests.training.jobs import losses, metrics, train_on

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
MODEL, WEIGHTS = "start/model", "start/model/model.safetensors"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and conversations about sums."""
    folder = tmp_path_factory.mktemp("inputs")
    finetune_start.write_all(folder / "start", num_attention_heads=4, **LLAMA)
    return folder


@pytest.fixture
def own(start: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    shutil.copytree(start, tmp_path / "own", ignore=shutil.ignore_patterns("runs"))
    return tmp_path / "own"


def job(folder: Path, *overrides: str, **sections: dict[str, Any]) -> Config:
    """A job of one step over all conversations that are held out, in the folder's runs."""
    values: dict[str, Any] = {
        "job_name": "job",
        "model": {"hf": str(folder / MODEL)},
        "data": {"type": "chat", "train_folder": str(folder / "start" / "valid"), "seq_len": 40},
        "train": {"total_steps": 1},
        "lr_scheduler": {"warmup_ratio": 0.0},
        "logging": {"console": False, "folder": str(folder / "runs")},
    }
    values["data"] |= {"micro_bsz": 5, "micro_num": 2}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return make_config(values, overrides)


def test_what_a_step_takes_is_said_and_what_cannot_fit_is_refused(
    start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_start(job(start)).startswith("expected on 1 x cpu: ")
    monkeypatch.setattr(preflight, "available_bytes", lambda place: 2.0**14)
    refused = r"memory: weights, .* GiB are there; (take|start|no plan)"
    with pytest.raises(StartError, match=refused):
        check_start(job(start, data={"micro_bsz": 4, "micro_num": 1}))


def test_the_example_learns_and_transformers_reads_what_comes_out(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "chat_start").symlink_to(start / "start")
    monkeypatch.chdir(tmp_path)
    file = ROOT / "examples" / "configs" / "chat_hf.toml"
    short = ["parallel.tensor=1", "train.total_steps=12", "optimizer.lr=0.02"]
    config = load_config(file, [*short, "logging.console=false"])
    assert train_on(0, config)[0] == 12
    valid = [line["loss"] for line in metrics(tmp_path / "runs", "chat_hf") if "group" in line]
    held_out = start / "start" / "valid" / "sums.jsonl"
    assert valid[-1] < held_out_loss(start / MODEL, held_out) - 1
    out = tmp_path / "trained"
    checkpoint = tmp_path / "runs" / "chat_hf" / "checkpoints" / "step-00000012"
    assert main(["convert", str(file), str(checkpoint), str(out), "--from=ilm", "--to=hf"]) == 0
    assert held_out_loss(out, held_out) == pytest.approx(valid[-1], rel=1e-5)
    assert {path.name for path in out.iterdir()} == {p.name for p in (start / MODEL).iterdir()}


def test_a_written_folder_says_the_dtype_of_its_weights(start: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "job.toml", tmp_path / "out"
    job(start).save(file)
    convert = ["convert", str(file), str(start / MODEL), str(out), "--from=hf", "--to=hf"]
    assert main([*convert, "--dtype=bfloat16"]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


PLANS = {"dp": ({}, 1), "tp": ({"tensor": 2}, 2)}


@pytest.mark.parametrize("name", PLANS)
def test_the_first_loss_is_that_of_the_folder(start: Path, world2: World, name: str) -> None:
    parallel, micro_num = PLANS[name]
    overrides = (f"job_name={name}", f"data.micro_num={micro_num}")
    world2.run(train_on, job(start, *overrides, parallel=parallel))
    expected = held_out_loss(start / MODEL, start / "start" / "valid" / "sums.jsonl")
    assert losses(start / "runs", name) == pytest.approx([expected], rel=1e-5)


def test_from_seed_starts_from_other_weights_of_the_same_shapes(start: Path) -> None:
    stored = load_file(start / WEIGHTS)
    loaded = initialize_model(job(start)).full_state_dict()
    drawn = initialize_model(job(start, model={"from_seed": True})).full_state_dict()
    assert all(torch.equal(loaded[name], stored[name]) for name in stored)
    assert {name: t.shape for name, t in drawn.items()} == {n: t.shape for n, t in stored.items()}
    assert not torch.equal(drawn["lm_head.weight"], stored["lm_head.weight"])


SHIFTED = {"type": "random", "train_folder": None, "fixed_random_dataset_seqlen": True}


def test_labels_of_any_data_stand_where_the_model_shifts_them_from(start: Path) -> None:
    batch = next(get_train_data_loader(job(start, data=SHIFTED)))
    kept = batch["labels"] >= 0
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert not kept[:, 0].any()
    assert kept[:, 1:].any()


def test_a_tied_head_that_the_folder_leaves_out_is_found_and_left_out_again(
    start: Path, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(
        **LLAMA, num_attention_heads=4, vocab_size=320, tie_word_embeddings=True
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / MODEL)
    job(tmp_path).save(tmp_path / "job.toml")
    stored = load_file(tmp_path / WEIGHTS)
    assert "lm_head.weight" not in stored
    found = initialize_model(job(tmp_path)).full_state_dict()
    assert torch.equal(found["lm_head.weight"], stored["model.embed_tokens.weight"])
    paths = [str(tmp_path / name) for name in ("job.toml", MODEL, "out")]
    arguments = [*paths, "--from=hf", "--to=hf", "--dtype=float32"]
    assert main(["convert", *arguments]) == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == stored.keys()


def test_tensors_that_transformers_renames_are_read_and_written_by_it(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        **LLAMA, num_attention_heads=4, num_key_value_heads=2, vocab_size=320, num_local_experts=2
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / MODEL)
    stored = load_file(tmp_path / WEIGHTS)
    model = hf_causal_lm(hf=str(tmp_path / MODEL))
    assert not stored.keys() <= model.state_dict().keys()
    job(tmp_path).save(tmp_path / "job.toml")
    paths = [str(tmp_path / name) for name in ("job.toml", MODEL, "out")]
    arguments = [*paths, "--from=hf", "--to=hf", "--dtype=float32"]
    assert main(["convert", *arguments]) == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)


Spoil = Callable[[Path], None]


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edited(**values: Any) -> Spoil:
    def edit(folder: Path) -> None:
        path = folder / MODEL / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


BROKEN: dict[str, tuple[Spoil, str]] = {
    "tensor": (without_a_tensor, r"missing_keys: \{'model.norm.weight'\}"),
    "files": (lambda folder: (folder / WEIGHTS).unlink(), r"expected \*\.safetensors files in"),
    "config": (lambda f: (f / MODEL / "config.json").unlink(), "model.hf: expected the folder of"),
    "unknown": (edited(model_type="no_such"), "model.hf: transformers cannot build"),
    "quantized": (edited(quantization_config={"quant_method": "awq"}), "weights are quantized"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_used_is_refused_before_any_work(own: Path, name: str) -> None:
    spoil, message = BROKEN[name]
    spoil(own)
    with pytest.raises(StartError, match=message):
        check_start(job(own))
    assert not (own / "runs").exists()


def test_a_run_does_not_go_on_with_another_config_json(own: Path) -> None:
    train_on(0, job(own))
    edited(rms_norm_eps=1e-3)(own)
    longer = "train.total_steps=2"
    with pytest.raises(CheckpointError, match=r"model\.config\.rms_norm_eps: 1e-06 -> 0\.001"):
        train_on(0, job(own, longer))
    moved = own.with_name("moved")
    own.rename(moved)
    allowed = "ckpt.allow_change=['model.config.rms_norm_eps']"
    assert train_on(0, job(moved, longer, allowed))[0] == 2


def test_weights_of_a_folder_with_another_config_are_refused(own: Path, start: Path) -> None:
    edited(rope_parameters={"rope_theta": 5.0, "rope_type": "default"})(own)
    load = {"load_path": str(own / MODEL), "load_format": "hf"}
    with pytest.raises(IlmCompileError, match=r"model\.config\.rope_parameters: .*5\.0"):
        train_on(0, job(start, "job_name=other", ckpt=load))


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "packing": ({"data": {"packing": "whole"}}, "data.packing: data.type='chat' has one"),
    "min_length": ({"data": {"min_length": 4}}, "data.min_length: data.type='chat' has one"),
    "split": ({"data": {"long_documents": "split"}}, "conversation is not split"),
    "no folder": ({"data": {"train_folder": None}}, "data.type='chat' needs a folder"),
    "smoothing": ({"loss": {"label_smoothing": 0.1}}, "loss of its own"),
    "key": ({"model": {"num_layers": 2}}, "model.num_layers is not a key"),
    "type": ({"model": {"from_seed": "yes"}}, "model.from_seed: expected true or false"),
    "allowed": ({"ckpt": {"allow_change": ["model.eps"]}}, "it has .*model.config.KEY"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_keys_that_contradict_are_refused(tmp_path: Path, name: str) -> None:
    sections, message = CONTRADICTIONS[name]
    with pytest.raises(ConfigError, match=message):
        job(tmp_path, **sections)


def test_packed_rows_need_a_model_that_takes_positions(tmp_path: Path) -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=320)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / MODEL)
    packed = {"type": "random", "train_folder": None}
    with pytest.raises(StartError, match=r"takes no position_ids.*data\.packing = 'window'"):
        check_start(job(tmp_path, data=packed))


def test_experts_of_a_folder_are_divided_over_ranks_and_written_back(
    own: Path, world2: World
) -> None:
    sizes = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    vocab = json.loads((own / MODEL / "config.json").read_text())["vocab_size"]
    config = transformers.Qwen3MoeConfig(
        **sizes, **heads, num_experts=4, num_experts_per_tok=2, vocab_size=vocab
    )
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(own / MODEL)
    steps, data = {"total_steps": 2}, {"micro_bsz": 2, "micro_num": 5}
    train_on(0, job(own, "job_name=alone", train=steps, data=data))
    divided = job(own, "job_name=divided", "parallel.expert=2", train=steps, data=data)
    assert world2.run(train_on, divided) == [(2, None)] * 2
    assert losses(own / "runs", "divided") == pytest.approx(losses(own / "runs", "alone"), rel=1e-5)
    file = own / "runs" / "divided" / "config.toml"
    for name in ("alone", "divided"):
        checkpoint = str(own / "runs" / name / "checkpoints" / "step-00000002")
        assert (
            main(["convert", str(file), checkpoint, str(own / name), "--from=ilm", "--to=hf"]) == 0
        )
    alone, other = (load_file(own / name / "model.safetensors") for name in ("alone", "divided"))
    assert alone.keys() == other.keys() == load_file(own / WEIGHTS).keys()
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in alone
    for name, value in alone.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4, msg=name)

"""Hugging Face's folders: the config beside the weights, tied heads, and files of torch.save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ilm_compile import models
from ilm_compile.cli import main
from ilm_compile.cli.model import load_model
from ilm_compile.convert import open_weights
from ilm_compile.convert.source import read_whole
from ilm_compile.errors import IlmCompileError
from tests.support.models import randomize_

SMALL: dict[str, Any] = {"num_layers": 2, "vocab_size": 64, "max_seq_len": 16}


def build(**fields: Any) -> nn.Module:
    return models.internlm2_tiny(**SMALL, **fields)


def hf_config(model: nn.Module, **changes: Any) -> dict[str, Any]:
    """What a Llama that computes the same says; a change to None leaves the key out."""
    config: Any = model.config
    values = {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_attention_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.layer_norm_epsilon,
        "rope_theta": config.rope_base,
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def weights() -> dict[str, Tensor]:
    return {n: t.clone() for n, t in randomize_(build()).state_dict().items()}


def theirs() -> dict[str, Tensor]:
    return models.to_hf_llama_state_dict(build(), weights())


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(path: Path, format_name: str = "hf", model: nn.Module | None = None) -> dict[str, Tensor]:
    source = open_weights(model or build(), path, format_name)
    return {name: read_whole(source, name) for name in source.specs()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())


# config.json


DYNAMIC = {"type": "dynamic", "factor": 2.0}
SAME: dict[str, dict[str, Any]] = {
    "plain": {},
    "transformers 5": {
        "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "activation": {"hidden_act": "swish"},
    "scaled in longer rows": {"rope_scaling": DYNAMIC, "max_position_embeddings": 16},
    "window as long as a row": {"sliding_window": 16, "model_type": "mistral"},
    "window off": {"sliding_window": 4, "use_sliding_window": False},
}
OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "base": ({"rope_theta": 1e4}, "rope_theta is 10000.0, here it is 1000000.0 by model.rope_base"),
    "no base": ({"rope_theta": None}, "rope_theta is 10000.0, here it is 1000000.0"),
    "base of transformers 5": ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0"),
    "base of InternLM": ({"rotary": {"base": 100, "type": "default"}}, "rope_theta is 100"),
    "scaling": ({"rope_scaling": {"rope_type": "llama3"}}, "the scaling of rope is {'rope_type': "),
    "scaling in these rows": (
        {"rope_scaling": DYNAMIC, "max_position_embeddings": 15},
        "the scaling of rope is {'type': 'dynamic'",
    ),
    "epsilon": ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06, here it is 1e-05 by model.layer_n"),
    "no epsilon": ({"rms_norm_eps": None}, "rms_norm_eps is 1e-06"),
    "heads": ({"num_attention_heads": 4}, "num_attention_heads is 4, here it is 8"),
    "key heads": ({"num_key_value_heads": None}, "num_key_value_heads is 8, here it is 4"),
    "width of heads": ({"head_dim": 4}, "head_dim is 4, here it is 8"),
    "layers": ({"num_hidden_layers": 3}, "num_hidden_layers is 3, here it is 2"),
    "width": ({"hidden_size": 128}, "hidden_size is 128"),
    "width inside": ({"intermediate_size": 9}, "intermediate_size is 9.*by model.mlp_ratio"),
    "vocabulary": ({"vocab_size": 65}, "vocab_size is 65, here it is 64"),
    "window": ({"sliding_window": 4}, "sliding_window is 4, here it is none"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is gelu, here it is silu"),
    "part turned": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, here it is 1"),
    "family": ({"model_type": "granite"}, "model_type is granite, here it is llama by model.type"),
}


@pytest.mark.parametrize("case", SAME)
def test_a_config_of_the_same_model_is_taken(tmp_path: Path, case: str) -> None:
    folder = write(tmp_path, theirs(), hf_config(build(), **SAME[case]))
    assert_same(read(folder), weights())


@pytest.mark.parametrize("case", OTHER)
def test_a_config_of_another_model_is_refused_naming_what_differs(
    tmp_path: Path, case: str
) -> None:
    changes, message = OTHER[case]
    folder = write(tmp_path, theirs(), hf_config(build(), **changes))
    with pytest.raises(IlmCompileError, match=f"config.json is of another model: .*{message}"):
        open_weights(build(), folder, "hf-llama")


@pytest.mark.parametrize("file", ["model.safetensors", "other.safetensors"])
def test_a_file_has_the_config_of_its_folder_if_it_is_its_weights(
    tmp_path: Path, file: str
) -> None:
    write(tmp_path, theirs(), hf_config(build(), rope_theta=1e4))
    (tmp_path / "model.safetensors").rename(tmp_path / file)
    if file == "model.safetensors":
        with pytest.raises(IlmCompileError, match="rope_theta"):
            open_weights(build(), tmp_path / file, "hf")
    else:
        assert_same(read(tmp_path / file), weights())


def test_a_difference_that_is_named_is_allowed(tmp_path: Path) -> None:
    folder = write(tmp_path, theirs(), hf_config(build(), rope_theta=1e4, rms_norm_eps=1e-6))
    allowed = ["model.rope_base"]
    with pytest.raises(IlmCompileError, match=r"model: rms_norm_eps .*\['model.layer_norm_eps"):
        open_weights(build(), folder, "hf", allow_change=allowed)
    open_weights(build(), folder, "hf", allow_change=[*allowed, "model.layer_norm_epsilon"])


def test_logits_are_those_of_hugging_face(tmp_path: Path) -> None:
    """For every folder that is taken: the table above says the same as transformers."""
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path, theirs(), hf_config(build(), tie_word_embeddings=False))
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    model = build()
    model.load_state_dict(read(folder))
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


# Tied embeddings


@pytest.mark.parametrize("has_head", [False, True])
def test_a_tied_head_is_the_embedding(tmp_path: Path, has_head: bool) -> None:
    """Also where the file has another: transformers does not look at it."""
    tensors = theirs()
    if not has_head:
        del tensors["lm_head.weight"]
    folder = write(tmp_path, tensors, hf_config(build(), tie_word_embeddings=True))
    with pytest.warns(UserWarning, match="lm_head.weight is model.embed_tokens.weight; here they"):
        got = read(folder)
    expected = weights()
    assert_same(got, {**expected, "output.weight": expected["tok_embeddings.weight"]})


@pytest.mark.parametrize("has_config", [False, True])
def test_a_head_that_is_missing_is_named_with_what_to_do(tmp_path: Path, has_config: bool) -> None:
    tensors = theirs()
    del tensors["lm_head.weight"]
    folder = write(tmp_path, tensors, hf_config(build()) if has_config else None)
    with pytest.raises(IlmCompileError, match=r"lm_head.weight: expected .*\"tie_word_embeddings"):
        open_weights(build(), folder, "hf")


# pytorch_model.bin


def one_file(folder: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def one_file_by_name(folder: Path, tensors: dict[str, Tensor]) -> Path:
    return one_file(folder, tensors) / "pytorch_model.bin"


def shards(folder: Path, tensors: dict[str, Tensor]) -> Path:
    weight_map = {}
    for index, half in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        file = f"pytorch_model-{index:05d}-of-00002.bin"
        torch.save({name: tensors[name] for name in half}, folder / file)
        weight_map |= dict.fromkeys(half, file)
    index_file = folder / "pytorch_model.bin.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def shards_without_index(folder: Path, tensors: dict[str, Tensor]) -> Path:
    shards(folder, tensors)
    (folder / "pytorch_model.bin.index.json").unlink()
    return folder


@pytest.mark.parametrize("layout", [one_file, one_file_by_name, shards, shards_without_index])
def test_files_of_torch_save_are_read(
    tmp_path: Path, layout: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"not weights")
    assert_same(read(layout(tmp_path, theirs())), weights())


def test_files_of_torch_save_have_a_config_too(tmp_path: Path) -> None:
    one_file(tmp_path, theirs())
    (tmp_path / "config.json").write_text(json.dumps(hf_config(build(), rope_theta=1e4)))
    with pytest.raises(IlmCompileError, match="rope_theta"):
        open_weights(build(), tmp_path, "hf")


def test_a_tensor_in_two_files_of_torch_save_is_named(tmp_path: Path) -> None:
    for name in "ab":
        torch.save({"x": torch.zeros(1)}, tmp_path / f"pytorch_model-{name}.bin")
    with pytest.raises(IlmCompileError, match="x is in two files"):
        open_weights(build(), tmp_path, "hf")


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        IlmCompileError, match=r"safetensors files in .*, found none, nor pytorch_mo"
    ):
        open_weights(build(), tmp_path, "hf")


# The tokens that a written config names


RUN = """
data = { type = "TYPE", seq_len = 16 }
train = { total_steps = 1 }
ckpt = { folder = "ckpt" }
logging = { console = false }
[model]
type = "INTERNLM2"
num_layers = 1
hidden_size = 16
num_attention_heads = 2
num_kv_attention_heads = 2
vocab_size = 258
mlp_ratio = 2.0
"""
BYTES = [None, 256, 257]
WITH_FILE = ("--tokenizer", "tokenizer.json")
TOKENS: dict[str, tuple[str, tuple[str, ...], list[int | None]]] = {
    "of the run": ("pydoc", (), BYTES),
    "not known": ("random", (), [None, None, None]),
    "as told": ("random", ("--tokenizer", "bytes"), BYTES),
    "of a file": ("pydoc", WITH_FILE, [None, 7, 7]),
    "with a beginning": ("random", (*WITH_FILE, "--begin-of-document", "<s>"), [5, 7, 7]),
    "another end": ("random", (*WITH_FILE, "--end-of-document", "<s>"), [None, 5, 5]),
}


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    vocabulary = {"<unk>": 0, "<s>": 5, "</s>": 7}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    return tmp_path


def write_run(kind: str, **changes: str) -> None:
    text = RUN.replace("TYPE", kind)
    Path("run.toml").write_text(text + "".join(f"{k} = {v}\n" for k, v in changes.items()))


def to_llama(model: str, source: str, *options: str) -> list[int | None]:
    """Convert into hf/; the tokens that its config names."""
    arguments = [model, source, "hf", "--from", "ilm", "--to", "hf-llama", *options]
    assert main(["convert", *arguments]) == 0
    config = json.loads(Path("hf/config.json").read_text())
    return [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")]


@pytest.mark.parametrize("case", TOKENS)
def test_a_written_config_names_the_tokens_of_the_data(
    run_folder: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, options, expected = TOKENS[case]
    write_run(kind)
    save_file(load_model("run.toml").to_empty(device="cpu").state_dict(), "a.safetensors")
    assert to_llama("run.toml", "a.safetensors", *options) == expected
    assert ("config.json names no tokens" in capsys.readouterr().err) == (case == "not known")


def test_a_checkpoint_knows_its_tokens_and_its_model(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("pydoc")
    assert main(["train", "--config", "run.toml"]) == 0
    write_run("random")
    assert to_llama("run.toml", "ckpt/step-00000001") == BYTES
    write_run("random", rope_base="5.0")
    arguments = ["run.toml", "ckpt/step-00000001", "new", "--from", "ilm", "--to", "hf-llama"]
    assert main(["convert", *arguments]) == 1
    refusal = "is of another model (its value -> this one's): model.rope_base: 1e+06 -> 5; give"
    assert refusal in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--end-of-document", "</s>"), "go with a --tokenizer"),
        (("--tokenizer", "bytes", "--begin-of-document", "<s>"), "needs a --tokenizer file"),
        (("--tokenizer", "nothing.json"), "expected a file at nothing.json"),
        (("--tokenizer", "bytes", "--to", "ilm", "--dtype", "bfloat16"), "--tokenizer is for the"),
    ],
    ids=["end", "begin", "file", "target"],
)
def test_options_of_tokens_without_effect_are_refused(
    run_folder: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["internlm2_tiny", "a.safetensors", "hf", "--from", "ilm", "--to", "hf-llama"]
    assert main(["convert", *arguments, *options]) == 1
    assert message in capsys.readouterr().err


def test_a_tokenizer_of_another_vocabulary_is_refused(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(weights(), run_folder / "a.safetensors")
    (run_folder / "small.py").write_text(
        "from ilm_compile import models\n"
        "def build(): return models.internlm2_tiny(num_layers=2, vocab_size=64, max_seq_len=16)\n"
    )
    arguments = ["small:build", "a.safetensors", "hf", "--from", "ilm", "--to", "hf-llama"]
    assert main(["convert", *arguments, "--tokenizer", "bytes"]) == 1
    assert "the tokenizer has a token 256, the model only 64" in capsys.readouterr().err

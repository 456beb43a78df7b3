"""The example that fine-tunes a Hugging Face folder, as a user would start it, made tiny."""

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples import finetune_hf, finetune_start
from examples.finetune_hf import main
from tests.support.held_out import held_out_loss

transformers = pytest.importorskip("transformers")
SMALL = ["--rows", "2", "--micro", "2", "--seq-len", "48", "--steps", "12", "--lr", "0.02"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LLAMA = {**SIZES, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and conversations about sums."""
    folder = tmp_path_factory.mktemp("inputs")
    finetune_start.write_conversations(folder / "sums.jsonl")
    texts = (folder / "sums.jsonl").read_text().splitlines()
    finetune_start.write_model(folder / "model", texts, **LLAMA)
    return folder


def start(inputs: Path, out: Path, *more: str) -> int:
    given = ["--model", str(inputs / "model"), "--data", str(inputs / "sums.jsonl")]
    return main([*given, "--out", str(out), *SMALL, *more])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_folder_comes_out_that_transformers_loads_and_that_has_learnt(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(inputs, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    before, after = (float(line.split()[2].strip(",")) for line in lines if "held-out" in line)
    assert lines[0].startswith("100 conversations by the chat template of chat_template.jinja; 0")
    assert lines[1] == "tp=1, dp=1, 4 conversations a step"
    assert lines[-1].startswith(f"saved {tmp_path / 'model'}; its logits differ by ")
    assert before == pytest.approx(
        held_out_loss(inputs / "model", inputs / "sums.jsonl", every=10), rel=1e-4
    )
    assert after == pytest.approx(
        held_out_loss(tmp_path / "model", inputs / "sums.jsonl", every=10), rel=1e-4
    )
    assert after < before - 1


def test_adapters_are_merged_into_the_weights_and_nothing_else_is_trained(
    inputs: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    assert start(inputs, tmp_path, "--lora", "2") == 0
    old, new = weights(inputs / "model"), weights(tmp_path / "model")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if "_proj" in name}
    assert all(torch.linalg.matrix_rank(new[n] - old[n], rtol=1e-3) <= 2 for n in changed)


def test_a_folder_with_other_weights_than_the_trained_ones_is_told(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = finetune_hf.save

    def spoil(parallel: Any, model: Any, tokens_of: Path, out: Path) -> None:
        saved(parallel, model, tokens_of, out)
        tensors = weights(out)
        tensors["model.norm.weight"] *= 1.01
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(finetune_hf, "save", spoil)
    assert start(inputs, tmp_path, "--steps", "1") == 1
    assert "model: expected a difference below 0.0001" in capsys.readouterr().err


def test_a_missing_peft_says_how_to_install_it(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = builtins.__import__

    def without_peft(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return load(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    assert start(inputs, tmp_path, "--lora", "2") == 1
    assert "--lora needs peft: pip install 'ilm_compile[lora]'" in capsys.readouterr().err


def test_missing_transformers_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune_hf.importlib.util, "find_spec", lambda name: None)
    assert main([]) == 1
    assert "pip install 'ilm_compile[hf]'" in capsys.readouterr().err


def test_a_result_is_never_written_over(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    assert start(inputs, tmp_path) == 1
    assert f"{tmp_path / 'model'} exists; remove it" in capsys.readouterr().err


def test_rows_too_short_for_any_answer_are_refused(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(inputs, tmp_path, "--seq-len", "8") == 1
    assert "in its first 8 tokens" in capsys.readouterr().err

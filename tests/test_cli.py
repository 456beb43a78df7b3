"""The command `ilm-compile`, run through `main` as the shell would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ilm_compile import models
from ilm_compile.cli import main

FORMATS = ("ilm", "hf-llama", "hf-internlm2")
TEXT = "Bytes are tokens. " * 40


def byte_model() -> nn.Module:
    return models.internlm2_tiny(num_layers=2)


def hf_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=64,
        )
    )


def no_model() -> int:
    return 7


def named(function: str) -> str:
    return f"{__name__}:{function}"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def weights_file(tmp_path: Path) -> Path:
    path = tmp_path / "ilm.safetensors"
    save_file(byte_model().state_dict(), path)
    return path


# explain


def test_explain_prints_plan_and_placements(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "internlm2_tiny", "--tp", "2", "--pp", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("plan: tp=2 pp=2 num_chunks=1 num_microbatches=2 schedule=1f1b")
    assert "attention.wqkv.weight   [128, 64]  S(0)" in out


def test_explain_never_makes_a_weight(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "internlm2_7b", "--after", "trace"]) == 0
    assert "output.weight  [92544, 4096]  I" in capsys.readouterr().out


def test_explain_dump_prints_the_graph(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", named("byte_model"), "--tp", "2", "--dump"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("def forward(self, ")
    assert "redistribute(" in out


def test_explain_after_a_pass_runs_no_later_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", named("byte_model"), "--pp", "2", "--after", "tensor-parallel"]) == 0
    out = capsys.readouterr().out
    assert "- tensor-parallel:" in out
    assert "pipeline-split" not in out


def test_explain_takes_the_shape_of_a_hugging_face_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["explain", named("hf_llama"), "--tp", "2", "--rows", "3", "--seq-len", "8"]
    assert main(arguments) == 0
    assert "input_ids [3, 8], labels [3, 8]" in capsys.readouterr().out


def test_options_change_the_plan_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"tp": 2, "num_microbatches": 6}')
    assert main(["explain", named("byte_model"), "--plan", str(path), "--pp", "2"]) == 0
    assert "plan: tp=2 pp=2 num_chunks=1 num_microbatches=6" in capsys.readouterr().out


def test_a_module_of_the_current_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = "from ilm_compile.models import internlm2_tiny\ndef two(): return internlm2_tiny()\n"
    (tmp_path / "my_models.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    assert main(["explain", "my_models:two", "--after", "trace"]) == 0
    assert "tok_embeddings.weight" in capsys.readouterr().out


# convert


@pytest.mark.parametrize("target", FORMATS[1:])
def test_convert_there_and_back_gives_the_same_bits(tmp_path: Path, target: str) -> None:
    original = {n: t.clone() for n, t in byte_model().state_dict().items()}
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    start = tmp_path / "start.safetensors"
    save_file(original, start)
    model = named("byte_model")
    assert main(["convert", model, str(start), str(there), "--from", "ilm", "--to", target]) == 0
    assert main(["convert", model, str(there), str(back), "--from", target, "--to", "ilm"]) == 0
    assert set(load_file(there)) != set(original)
    result = load_file(back)
    assert result.keys() == original.keys()
    assert all(torch.equal(result[name], original[name]) for name in original)


def test_convert_reads_a_folder_of_files(tmp_path: Path, weights_file: Path) -> None:
    tensors = load_file(weights_file)
    parts = tmp_path / "parts"
    parts.mkdir()
    names = sorted(tensors)
    for index, chunk in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in chunk}, parts / f"{index}.safetensors")
    out = tmp_path / "out.safetensors"
    arguments = ["convert", named("byte_model"), str(parts), str(out)]
    assert main([*arguments, "--from", "ilm", "--to", "hf-llama"]) == 0
    assert "model.layers.1.self_attn.q_proj.weight" in load_file(out)


# errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "internlm3"], "unknown model 'internlm3': expected a config file, MOD"),
        (["explain", "no_such:model"], "cannot import the module 'no_such'"),
        (["explain", named("absent")], f"module '{__name__}' has no function 'absent'"),
        (["explain", named("no_model")], "expected a function that returns an nn.Module"),
        (["explain", named("hf_llama")], "LlamaForCausalLM has no example_inputs"),
        (["explain", "internlm2_tiny", "--rows", "2"], "--rows 2 needs --seq-len"),
        (["explain", "internlm2_tiny", "--tp", "3"], "tp=3 does not divide the 8 attention heads"),
        (["explain", "internlm2_tiny", "--schedule", "x"], "unknown schedule 'x'; known: "),
        (["explain", "internlm2_tiny", "--dtype", "fp8"], "dtype must be None, torch.bfloat16 or"),
        (["explain", "internlm2_tiny", "--plan", "absent.json"], "absent.json"),
        (["explain", "internlm2_tiny", "--after", "x"], "expected one of trace, tensor-parallel"),
        (["prepare-data", "absent.txt", "--out", "x"], "absent.txt"),
        (
            ["convert", "internlm2_tiny", "a", "b", "--from", "ilm", "--to", "ilm"],
            "--from and --to are both ilm",
        ),
        (
            ["convert", named("hf_llama"), "a", "b", "--from", "ilm", "--to", "hf-llama"],
            "expected an InternLM or InternLM2, got LlamaForCausalLM",
        ),
        (
            ["convert", "internlm2_tiny", "absent", "b", "--from", "ilm", "--to", "hf-llama"],
            "absent",
        ),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_error_is_one_message_and_exit_code_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ilm-compile: ")
    assert message in captured.err


def test_a_plan_that_is_not_json_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("tp: 2")
    assert main(["explain", "internlm2_tiny", "--plan", str(path)]) == 1
    assert f"expected the JSON of a plan in {path}" in capsys.readouterr().err


def test_convert_names_the_tensor_that_does_not_fit(
    tmp_path: Path, weights_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", "internlm2_tiny", str(weights_file), str(tmp_path / "b")]
    assert main([*arguments, "--from", "ilm", "--to", "hf-llama"]) == 1
    error = capsys.readouterr().err
    assert "layers.2.attention.wo.weight: expected shape (64, 64), got no such tensor" in error


def test_a_file_that_is_not_safetensors_is_named(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", named("byte_model"), str(text_file), str(tmp_path / "b")]
    assert main([*arguments, "--from", "ilm", "--to", "hf-llama"]) == 1
    assert f"{text_file}: expected a safetensors file" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    command = [sys.executable, "-m", "ilm_compile.cli", "explain", "internlm2_tiny", "--dump"]
    process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    os.close(read)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (0, "")

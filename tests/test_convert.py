"""Weights of other formats in and out: bit for bit, in bounded memory, executing nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ilm_compile
from ilm_compile import models
from ilm_compile.cli import main
from ilm_compile.convert import load_weights, open_weights
from ilm_compile.convert.safetensors_files import INDEX
from ilm_compile.convert.source import read_whole
from ilm_compile.errors import IlmCompileError
from ilm_compile.runtime.checkpoint import CheckpointManager
from tests.support.internlm_files import write_internlm_files
from tests.support.models import randomize_
from tests.support.world import World

SMALL = {"num_layers": 4, "vocab_size": 64, "max_seq_len": 16}


def v1() -> nn.Module:
    return models.internlm_tiny(**SMALL)


def v2() -> nn.Module:
    return models.internlm2_tiny(**SMALL)


def v2_alternating() -> nn.Module:
    return models.internlm2_tiny(**SMALL, adapt_hf=False, norm_head=True)


MODELS: dict[str, Callable[[], nn.Module]] = {"v1": v1, "v2": v2, "alternating": v2_alternating}


def weights(name: str) -> dict[str, Tensor]:
    """Random weights, the head already scaled where the model scales it."""
    state = {n: t.clone() for n, t in randomize_(MODELS[name]()).state_dict().items()}
    if name == "alternating":
        # A matrix whose rows have length 1 to the last bit comes back from scaling unchanged.
        state["output.weight"] = torch.eye(64)
    return state


def convert(name: str, source: Path, target: Path, *options: str) -> int:
    function = {"v1": "v1", "v2": "v2", "alternating": "v2_alternating"}[name]
    return main(["convert", f"{__name__}:{function}", str(source), str(target), *options])


def read_folder(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


# Hugging Face


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("v1", "hf-llama"),
        ("v2", "hf-llama"),
        ("v2", "hf-internlm2"),
        ("alternating", "hf-llama"),
        ("alternating", "hf-internlm2"),
    ],
)
def test_shards_there_and_back(tmp_path: Path, name: str, target: str) -> None:
    """Equal to the conversion of whole state dicts, in pieces smaller than a tensor."""
    original = weights(name)
    save_file(original, tmp_path / "start.safetensors")
    shards = ("--shard-gb", "1e-4")
    there = tmp_path / "there"
    assert (
        convert(
            name, tmp_path / "start.safetensors", there, "--from", "ilm", "--to", target, *shards
        )
        == 0
    )
    whole = {
        "hf-llama": models.to_hf_llama_state_dict,
        "hf-internlm2": models.to_hf_internlm2_state_dict,
    }
    expected = whole[target](MODELS[name](), original)
    index = json.loads((there / INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == expected.keys()
    assert_same(read_folder(there), expected)
    for source in (target, "hf"):
        back = tmp_path / f"back-{source}.safetensors"
        assert convert(name, there, back, "--from", source, "--to", "ilm") == 0
        assert_same(load_file(back), original)


@pytest.mark.parametrize("limit", [1, 1 << 20])
def test_pieces_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("ilm_compile.convert.write.READ_BYTES", limit)
    original = weights("alternating")
    save_file(original, tmp_path / "a.safetensors")
    assert (
        convert(
            "alternating",
            tmp_path / "a.safetensors",
            tmp_path / "b",
            "--from",
            "ilm",
            "--to",
            "hf-llama",
        )
        == 0
    )
    expected = models.to_hf_llama_state_dict(v2_alternating(), original)
    assert_same(read_folder(tmp_path / "b"), expected)


@pytest.mark.parametrize("name", ["v1", "v2", "alternating"])
def test_hugging_face_computes_the_same(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = MODELS[name]()
    model.load_state_dict(weights(name))
    save_file(weights(name), tmp_path / "a.safetensors")
    assert (
        convert(
            name, tmp_path / "a.safetensors", tmp_path / "hf", "--from", "ilm", "--to", "hf-llama"
        )
        == 0
    )
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float()
    tokens = torch.arange(24).view(2, 12) % 64
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


def test_another_dtype(tmp_path: Path) -> None:
    original = weights("v2")
    save_file(original, tmp_path / "a.safetensors")
    options = ("--from", "ilm", "--to", "ilm", "--dtype", "bfloat16")
    assert convert("v2", tmp_path / "a.safetensors", tmp_path / "b.safetensors", *options) == 0
    assert_same(
        load_file(tmp_path / "b.safetensors"), {n: t.bfloat16() for n, t in original.items()}
    )


def test_weights_of_a_checkpoint(tmp_path: Path) -> None:
    model = v2()
    model.load_state_dict(weights("v2"))
    parallel = ilm_compile.parallelize(model)
    manager = CheckpointManager(tmp_path / "ckpt", parallel)
    manager.save(3, wait=True)
    manager.close()
    folder = tmp_path / "ckpt" / "step-00000003"
    assert convert("v2", folder, tmp_path / "b.safetensors", "--from", "ilm", "--to", "ilm") == 0
    assert_same(load_file(tmp_path / "b.safetensors"), weights("v2"))


# InternLM's own


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v1", {}),
        ("v1", {"tp": 2}),
        ("v1", {"tp": 2, "pp": 2, "old_names": True}),
        ("v2", {"tp": 4, "pp": 2}),
        ("v2", {"pp": 2, "chunks": 2}),
        ("alternating", {"tp": 2, "pp": 4}),
    ],
    ids=str,
)
def test_files_of_internlm(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    original = weights(name)
    write_internlm_files(original, tmp_path / "in", num_layers=4, **options)
    assert (
        convert(name, tmp_path / "in", tmp_path / "out", "--from", "internlm", "--to", "ilm") == 0
    )
    assert_same(read_folder(tmp_path / "out"), original)


def test_old_names_of_the_embedding_and_stored_frequencies(tmp_path: Path) -> None:
    original = weights("v1")
    stored = {f"model.{n}": t for n, t in original.items()}
    stored["model.embedding.word_embeddings.weight"] = stored.pop("model.embedding.weight")
    stored["model.blocks.0.mixer.rotary_emb.inv_freq"] = torch.zeros(4)
    torch.save(stored, tmp_path / "model_tp0_pp0.pt")
    source = open_weights(v1(), tmp_path, "internlm")
    assert_same({name: read_whole(source, name) for name in source.specs()}, original)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    write_internlm_files(weights("v2"), tmp_path, num_layers=4, tp=2, pp=2)
    (tmp_path / "model_tp0_pp1.pt").unlink()
    with pytest.raises(IlmCompileError, match=r"2 x 2 ranks, model_tp0_pp1\.pt is missing"):
        open_weights(v2(), tmp_path, "internlm")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: models.internlm2_tiny(num_layers=4, vocab_size=96),
            "tok_embeddings.weight: expected a part",
        ),
        (lambda: models.internlm2_tiny(num_layers=5, vocab_size=64), "layers.4.*no such tensor"),
        (v1, "blocks.0.*no such tensor"),
    ],
    ids=["vocabulary", "layers", "family"],
)
def test_another_model_is_refused(
    tmp_path: Path, build: Callable[[], nn.Module], message: str
) -> None:
    write_internlm_files(weights("v2"), tmp_path, num_layers=4, tp=2)
    with pytest.raises(IlmCompileError, match=message):
        open_weights(build(), tmp_path, "internlm")


# Into a parallel model


def load_in_parallel(rank: int, folder: str, pp: int) -> tuple[dict[str, Tensor], int]:
    from ilm_compile.convert import safetensors_files

    sizes = []
    read_box = safetensors_files.read_box
    safetensors_files.read_box = lambda *a: sizes.append(v := read_box(*a)) or v  # type: ignore
    with torch.device("meta"):
        model = v2_alternating()
    parallel = ilm_compile.parallelize(model, tp=2 // pp, pp=pp)
    load_weights(parallel, model, folder, "hf")
    safetensors_files.read_box = read_box
    return parallel.full_state_dict(), sum(value.nbytes for value in sizes)


@pytest.mark.parametrize("pp", [1, 2])
def test_each_rank_reads_what_it_holds(world2: World, tmp_path: Path, pp: int) -> None:
    original = weights("alternating")
    theirs = models.to_hf_internlm2_state_dict(v2_alternating(), original)
    save_file(theirs, tmp_path / "model.safetensors")
    (full, *_), sizes = zip(*world2.run(load_in_parallel, str(tmp_path), pp), strict=True)
    assert_same(full, original)
    total = sum(value.nbytes for value in theirs.values())
    assert all(size < 0.7 * total for size in sizes)


# Memory


CONVERT = """
import sys
from ilm_compile import models
from ilm_compile.cli import main

def small(): return models.internlm2_tiny(num_layers=2)
def large(): return models.internlm2_tiny(num_layers=2, hidden_size=512, vocab_size=80_000)

def peak():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) / 1024

def convert(name):
    arguments = [f"measured:{name}", f"{name}.safetensors", f"{name}-out"]
    assert main(["convert", *arguments, "--from", "ilm", "--to", "hf-llama"]) == 0

if __name__ == "__main__":
    convert("small")  # whatever is imported when it is first needed
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    before = peak()
    convert("large")
    print(peak() - before)
"""


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    """Two tensors of 156 MiB each: MiB that a process takes beyond what a small model takes."""
    (tmp_path / "measured.py").write_text(CONVERT)
    large = models.internlm2_tiny(num_layers=2, hidden_size=512, vocab_size=80_000)
    for name, model in (("small", models.internlm2_tiny(num_layers=2)), ("large", large)):
        tensors = {n: t.clone() for n, t in model.state_dict().items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    result = subprocess.run(
        [sys.executable, "measured.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "large-out" / "model.safetensors").stat().st_size > 300 << 20
    assert float(result.stdout.split()[-1]) < 100


# Refusals


def test_an_output_that_exists_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(weights("v2"), tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert (
        convert(
            "v2", tmp_path / "a.safetensors", tmp_path / "out", "--from", "ilm", "--to", "hf-llama"
        )
        == 1
    )
    assert "expected a new or an empty folder" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "out"]


def test_nothing_is_left_of_a_conversion_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(weights("v2"), tmp_path / "a.safetensors")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ilm_compile.convert.write.write_tensor_file", full)
    for target in ("out", "out.safetensors"):
        assert (
            convert(
                "v2",
                tmp_path / "a.safetensors",
                tmp_path / target,
                "--from",
                "ilm",
                "--to",
                "hf-llama",
            )
            == 1
        )
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "absent.safetensors"])
def test_an_index_names_files_beside_it(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(IlmCompileError, match=rf"index\.json: .*{name}"):
        open_weights(v2(), tmp_path, "hf")


def test_a_tensor_in_two_files_is_named(tmp_path: Path) -> None:
    for file in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(IlmCompileError, match="x is in two files"):
        open_weights(v2(), tmp_path, "hf")

"""Checkpoints of present InternEvo: q, k and v apart, and the files of weight-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ilm_compile import models
from ilm_compile.convert import open_weights
from ilm_compile.convert.source import read_whole
from ilm_compile.errors import IlmCompileError
from ilm_compile.models.packing import unpack_qkv
from tests.support.internlm_files import write_internlm_files
from tests.support.models import randomize_

SMALL = {"num_layers": 4, "vocab_size": 64, "max_seq_len": 16}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "v1": lambda: models.internlm_tiny(**SMALL),
    "v2": lambda: models.internlm2_tiny(**SMALL),
    "alternating": lambda: models.internlm2_tiny(**SMALL, adapt_hf=False),
}


def weights(name: str) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in randomize_(MODELS[name]()).state_dict().items()}


def assert_read(folder: Path, name: str, expected: dict[str, Tensor]) -> None:
    source = open_weights(MODELS[name](), folder, "internlm")
    assert source.specs().keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(read_whole(source, key), value), key


def apart(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fused matrices cut into wq, wk and wv, the rows of each head as they were."""
    if isinstance(config, models.InternLM2Config):
        config = replace(config, adapt_hf=True)
    out = {}
    for name, value in tensors.items():
        fused = next((part for part in (".Wqkv.", ".wqkv.") if part in name), None)
        if fused is None:
            out[name] = value
            continue
        for part, piece in zip("qkv", unpack_qkv(config, value), strict=True):
            out[name.replace(fused, f".w{part}.")] = piece.contiguous()
    return out


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["v1", "v2", "alternating"])
def test_q_k_and_v_in_matrices_of_their_own(tmp_path: Path, name: str, tp: int) -> None:
    original = weights(name)
    parts = apart(MODELS[name]().config, original)
    assert len(parts) > len(original)
    write_internlm_files(parts, tmp_path, num_layers=4, tp=tp)
    assert_read(tmp_path, name, original)


@pytest.mark.parametrize("names", ["model_tp{t}_wp{w}_pp{p}.pt", "model_wp{w}_pp{p}.pt"])
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_files_of_weight_parallel_ranks(tmp_path: Path, name: str, names: str) -> None:
    original = weights(name)
    for rank in range(2):
        state = {f"model.{n}": t.chunk(2)[rank] if t.ndim > 1 else t for n, t in original.items()}
        state = {n: t.chunk(2)[rank] if n.endswith("qkv.bias") else t for n, t in state.items()}
        torch.save(state, tmp_path / names.format(t=rank, w=rank, p=0))
    assert_read(tmp_path, name, original)


def test_files_of_two_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name in ("model_tp0_pp0.pt", "model_wp0_pp0.pt"):
        torch.save(weights("v2"), tmp_path / name)
    with pytest.raises(IlmCompileError, match="files of one checkpoint"):
        open_weights(MODELS["v2"](), tmp_path, "internlm")

"""What `full_state_dict` and `full_gradients` give can be saved as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ilm_compile
from examples.custom_pass import MergeGateUp
from ilm_compile.models import internlm2_tiny
from tests.support.tiny_model import TinyTransformer

ROW = ((1, 8), torch.int64)
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "tied": (lambda: TinyTransformer(vocab=33, tied=True), {}),
    "merged": (lambda: internlm2_tiny(num_layers=1), {"passes": [MergeGateUp()]}),
}


@pytest.mark.parametrize("what", ["full_state_dict", "full_gradients"])
@pytest.mark.parametrize("model", MODELS)
def test_full_tensors_have_memory_of_their_own(tmp_path: Path, model: str, what: str) -> None:
    build, options = MODELS[model]
    inputs = {"input_ids": ROW, "labels": ROW}
    parallel = ilm_compile.parallelize(build(), example_inputs=inputs, **options)
    tokens = torch.arange(8).view(1, 8)
    parallel.execute_schedule({"input_ids": tokens, "labels": tokens})
    full = getattr(parallel, what)()
    save_file(full, tmp_path / "full.safetensors")
    saved = load_file(tmp_path / "full.safetensors")
    assert saved.keys() == full.keys()
    assert all(torch.equal(saved[name], value) for name, value in full.items())

"""The sizes of a model: its parameters, and which stage has which layers."""

import pytest
import torch

from ilm_compile.cost.sizes import ModelSizes, stage_layers
from ilm_compile.errors import PlanError
from ilm_compile.models import InternLM2, InternLM2Config


def test_parameters_are_those_of_the_model() -> None:
    config = InternLM2Config(
        hidden_size=64,
        num_layers=3,
        num_attention_heads=8,
        num_kv_attention_heads=2,
        mlp_ratio=1.5,
        multiple_of=32,
        vocab_size=128,
    )
    with torch.device("meta"):
        model = InternLM2(config)
    sizes = ModelSizes(hidden=64, layers=3, heads=8, kv_heads=2, ffn=96, vocab=128, ffn_matrices=3)
    last_norm = 64
    assert sizes.parameters + last_norm == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("layers", "pp", "expected"),
    [
        (32, 1, (32, 32, 32)),
        (32, 4, (8, 8, 8)),
        (22, 8, (2, 3, 2)),
        (30, 4, (7, 8, 7)),
        (29, 4, (8, 8, 5)),
    ],
)
def test_layers_of_the_stages(layers: int, pp: int, expected: tuple[int, int, int]) -> None:
    assert stage_layers(layers, pp) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers=0 of a model; expected at least 1"),
        ({"kv_heads": 3}, "heads=8 is not a multiple of kv_heads=3"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, int], message: str) -> None:
    sizes = {"hidden": 64, "layers": 2, "heads": 8, "kv_heads": 8, "ffn": 96, "vocab": 128}
    with pytest.raises(PlanError, match=message):
        ModelSizes(**{**sizes, **changes})

"""Sizes of a model from its graph: of our models and of Hugging Face's, dense and with experts."""

from typing import Any

import pytest
import torch
from torch import nn

from ilm_compile.cost.sizes import ModelSizes
from ilm_compile.errors import PlanError
from ilm_compile.models import InternLM, InternLM2, InternLM2Config, InternLMConfig
from ilm_compile.planner.model_sizes import sizes_of
from ilm_compile.program.trace import trace

IDS = {"input_ids": ((1, 16), torch.int64), "labels": ((1, 16), torch.int64)}
COMMON = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 128}


def sizes(model: nn.Module) -> ModelSizes:
    return sizes_of(trace(model, example_inputs=IDS))


def hugging_face(name: str, **changes: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        **COMMON, num_attention_heads=8, intermediate_size=96, **changes
    )
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config)
    return model


def ours(kind: Any, config: Any, **changes: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = kind(
            config(
                hidden_size=64,
                num_layers=3,
                num_attention_heads=8,
                mlp_ratio=1.5,
                multiple_of=32,
                vocab_size=128,
                **changes,
            )
        )
    return model


DENSE = {"hidden": 64, "layers": 3, "heads": 8, "kv_heads": 8, "ffn": 96, "vocab": 128}


def test_internlm() -> None:
    assert sizes(ours(InternLM, InternLMConfig)) == ModelSizes(**DENSE)


def test_internlm2_with_fused_and_grouped_keys() -> None:
    model = ours(InternLM2, InternLM2Config, num_kv_attention_heads=2)
    assert sizes(model) == ModelSizes(**{**DENSE, "kv_heads": 2})


def test_llama_with_a_tied_head() -> None:
    model = hugging_face("Llama", num_key_value_heads=4, tie_word_embeddings=True)
    assert sizes(model) == ModelSizes(**{**DENSE, "kv_heads": 4}, tied=True)


def test_eager_attention_and_heads_of_another_size() -> None:
    model = hugging_face(
        "Qwen3",
        num_key_value_heads=2,
        head_dim=16,
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    assert sizes(model) == ModelSizes(**{**DENSE, "kv_heads": 2}, head_dim=16)


def test_a_plain_feed_forward_block_has_two_matrices() -> None:
    model = hugging_face("GPTNeoX", tie_word_embeddings=False)
    assert sizes(model) == ModelSizes(**DENSE, ffn_matrices=2)


def test_experts() -> None:
    model = hugging_face(
        "Qwen3Moe",
        num_key_value_heads=4,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        tie_word_embeddings=False,
    )
    expected = {**DENSE, "kv_heads": 4, "ffn": 32, "experts": 4, "top_k": 2}
    assert sizes(model) == ModelSizes(**expected)


class Mixer(nn.Module):
    """Repeated blocks that attend to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten() % 8)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(PlanError, match="no block with attention"):
        sizes(Mixer())

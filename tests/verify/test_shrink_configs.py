"""`shrink` understands the configurations of Hugging Face models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ilm_compile.verify.shrink import shrink

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16, "vocab_size": 1001}


def full(kind: str, **config: Any) -> nn.Module:
    made = getattr(transformers, f"{kind}Config")(**config)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize(("tp", "heads"), [(1, 2), (2, 2), (8, 8)])
def test_a_head_alone_only_where_there_is_one(tp: int, heads: int) -> None:
    small = shrink(full("OPT", **SIZES, ffn_dim=64, word_embed_proj_dim=512), tp=tp, num_stages=1)
    assert small.config.num_attention_heads == heads


@pytest.mark.parametrize("tp", [2, 3, 7, 8])
def test_a_vocabulary_is_padded_if_the_big_one_is(tp: int) -> None:
    small = shrink(full("Llama", **SIZES), tp=tp, num_stages=1)
    assert (small.config.vocab_size % tp == 0) == (1001 % tp == 0)


@pytest.mark.parametrize(("num_tokens", "window"), [(4096, 8), (512, 1024)])
def test_a_window_stays_shorter_or_longer_than_a_row(num_tokens: int, window: int) -> None:
    model = full("Mistral", **SIZES, num_key_value_heads=4, sliding_window=1024)
    small = shrink(model, tp=2, num_stages=1, num_tokens=num_tokens)
    assert small.config.sliding_window == window


def test_rotary_dimensions_fit_the_heads() -> None:
    sizes = {"n_embd": 512, "n_layer": 8, "n_head": 4, "rotary_dim": 64}
    small = shrink(full("GPTJ", **sizes), tp=2, num_stages=1)
    assert small.config.rotary_dim == 4


def test_experts_stay_as_many() -> None:
    model = full("Mixtral", **SIZES, num_key_value_heads=4, num_local_experts=6)
    small = shrink(model, tp=2, num_stages=1)
    assert (small.config.num_local_experts, small.config.num_key_value_heads) == (6, 2)

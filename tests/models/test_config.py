"""Configs refuse what cannot be built, and the registry builds models by name."""

import dataclasses

import pytest
import torch
from torch import nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.models import (
    MODEL_INITIALIZER,
    InternLM,
    InternLM2,
    InternLM2Config,
    InternLMConfig,
    Registry,
    initialize_model,
)

SIZES = {"num_layers": 1, "hidden_size": 32, "vocab_size": 16, "num_attention_heads": 8}
SIZES2 = {**SIZES, "num_kv_attention_heads": 4}
REFUSED = {
    "num_layers": ({"num_layers": 0}, "num_layers must be positive"),
    "hidden_size": ({"hidden_size": -32}, "hidden_size must be positive"),
    "rope_base": ({"rope_base": 0.0}, "rope_base must be positive"),
    "negative std": ({"out_head_init_std": -0.1}, "out_head_init_std must not be negative"),
    "heads": ({"num_attention_heads": 5}, "hidden_size=32 must be a multiple of num_attention"),
    "odd head": ({"hidden_size": 24}, r"hidden_size / num_attention_heads = 3 must be even"),
    "grad scale": ({"embed_grad_scale": 1.5}, r"embed_grad_scale=1.5 must lie in \[0, 1\]"),
    "norm_type": ({"norm_type": "x"}, "norm_type='x' must be 'rmsnorm' or 'layernorm'"),
    "multiple_of": ({"multiple_of": 0}, "multiple_of must be positive"),
    "init_type": ({"init_type": "xavier"}, "init_type='xavier' must be 'normal' or 'uniform'"),
}
REFUSED2 = {
    "kv heads": ({"num_kv_attention_heads": 0}, "num_kv_attention_heads must be positive"),
    "kv heads do not divide": (
        {"num_kv_attention_heads": 3},
        "num_attention_heads=8 must be a multiple of num_kv_attention_heads=3",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("config_class", [InternLMConfig, InternLM2Config])
def test_refuses_a_field(config_class, change, message):
    sizes = SIZES if config_class is InternLMConfig else SIZES2
    with pytest.raises(IlmCompileError, match=f"{config_class.__name__}: {message}"):
        config_class(**{**sizes, **change})


@pytest.mark.parametrize(("change", "message"), REFUSED2.values(), ids=list(REFUSED2))
def test_internlm2_refuses_a_field(change, message):
    with pytest.raises(IlmCompileError, match=message):
        InternLM2Config(**{**SIZES2, **change})


def test_a_config_is_frozen_and_can_be_varied():
    config = InternLM2Config(**SIZES2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 2
    assert dataclasses.replace(config, num_layers=2).num_layers == 2


@pytest.mark.parametrize(
    ("model_type", "fields", "expected"),
    [
        ("INTERNLM", SIZES, InternLM),
        ("INTERNLM2", SIZES2, InternLM2),
        ("INTERNLM2_PUBLIC", SIZES2, InternLM2),
        ("INTERNLM3", SIZES2, InternLM2),
        ("LLAMA", SIZES2, InternLM2),
        ("LLAMA2", SIZES2, InternLM2),
    ],
)
def test_initialize_model(model_type, fields, expected):
    model = initialize_model({"model_type": model_type, "model": fields, "JOB_NAME": "test"})
    assert type(model) is expected
    assert model(torch.arange(4)[None]).shape == (1, 4, 16)


def test_initialize_model_refuses_an_unknown_type():
    with pytest.raises(
        IlmCompileError,
        match="unknown model type 'GPT'; known: BAICHUAN2, HF, INTERNLM, INTERNLM2, ",
    ):
        initialize_model({"model_type": "GPT", "model": {}})


def test_initialize_model_refuses_an_unknown_field():
    with pytest.raises(
        IlmCompileError, match=r"InternLM2Config: unknown field num_experts; known fields: num_lay"
    ):
        initialize_model({"model_type": "INTERNLM2", "model": {**SIZES2, "num_experts": 4}})


def test_initialize_model_refuses_a_missing_field():
    with pytest.raises(
        IlmCompileError, match="InternLM2Config: missing field num_kv_attention_heads"
    ):
        initialize_model({"model_type": "INTERNLM2", "model": SIZES})


def test_initialize_model_refuses_a_config_without_a_model():
    with pytest.raises(IlmCompileError, match="the config lacks model; it has model_type"):
        initialize_model({"model_type": "INTERNLM2"})


def test_a_registry_returns_what_was_registered():
    registry = Registry("toy")

    @registry.register_module(module_name="LINE")
    class Line(nn.Linear):
        pass

    registry.register_module("BY_POSITION")(Line)
    assert registry.get_module("LINE") is Line
    assert registry.get_module(module_name="BY_POSITION") is Line
    assert registry.has("LINE")
    assert not registry.has("CURVE")
    assert MODEL_INITIALIZER.has("INTERNLM2")


def test_a_registry_refuses_a_name_twice():
    registry = Registry("toy")
    registry.register_module(module_name="LINE")(nn.Linear)
    with pytest.raises(IlmCompileError, match="toy 'LINE' is registered already"):
        registry.register_module(module_name="LINE")(nn.Linear)

"""Parameter counts, names and shapes of the presets, and what example_inputs says."""

import pytest
import torch

from ilm_compile import models
from ilm_compile.errors import IlmCompileError

COUNTS = {
    "internlm_7b": 7_321_948_160,
    "internlm_20b": 20_089_943_040,
    "internlm2_1_8b": 1_889_110_016,
    "internlm2_7b": 7_737_708_544,
    "internlm2_20b": 19_861_149_696,
}


@pytest.mark.parametrize(("preset", "count"), COUNTS.items(), ids=list(COUNTS))
def test_parameter_count(preset, count):
    with torch.device("meta"):
        model = getattr(models, preset)()
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def shapes(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_names_and_shapes_of_internlm():
    with torch.device("meta"):
        model = models.internlm_7b(num_layers=1)
    assert shapes(model) == {
        "embedding.weight": (103168, 4096),
        "blocks.0.norm1.weight": (4096,),
        "blocks.0.mixer.Wqkv.weight": (12288, 4096),
        "blocks.0.mixer.Wqkv.bias": (12288,),
        "blocks.0.mixer.out_proj.weight": (4096, 4096),
        "blocks.0.mixer.out_proj.bias": (4096,),
        "blocks.0.norm2.weight": (4096,),
        "blocks.0.mlp.w1.weight": (11008, 4096),
        "blocks.0.mlp.w3.weight": (11008, 4096),
        "blocks.0.mlp.w2.weight": (4096, 11008),
        "norm.weight": (4096,),
        "head.weight": (103168, 4096),
    }


def test_names_and_shapes_of_internlm2():
    with torch.device("meta"):
        model = models.internlm2_7b(num_layers=1)
    assert shapes(model) == {
        "tok_embeddings.weight": (92544, 4096),
        "layers.0.attention_norm.weight": (4096,),
        "layers.0.attention.wqkv.weight": (6144, 4096),
        "layers.0.attention.wo.weight": (4096, 4096),
        "layers.0.ffn_norm.weight": (4096,),
        "layers.0.feed_forward.w1.weight": (14336, 4096),
        "layers.0.feed_forward.w3.weight": (14336, 4096),
        "layers.0.feed_forward.w2.weight": (4096, 14336),
        "norm.weight": (4096,),
        "output.weight": (92544, 4096),
    }


@pytest.mark.parametrize(
    ("hidden_size", "mlp_ratio", "expected"),
    [(4096, 8 / 3, 11008), (5120, 8 / 3, 13824), (6144, 8 / 3, 16384), (64, 3.5, 256)],
)
def test_mlp_width_is_rounded_up_to_256(hidden_size, mlp_ratio, expected):
    config = models.InternLMConfig(
        num_layers=1,
        vocab_size=8,
        num_attention_heads=8,
        hidden_size=hidden_size,
        mlp_ratio=mlp_ratio,
    )
    assert config.ffn_hidden_size == expected


def test_the_models_have_no_buffers():
    assert list(models.internlm_tiny().buffers()) == []
    assert list(models.internlm2_tiny().buffers()) == []


def test_presets_of_internlm2_differ_where_the_releases_do():
    with torch.device("meta"):
        small, middle = models.internlm2_1_8b(), models.internlm2_7b(num_layers=1)
    assert (small.config.norm_head, small.config.adapt_hf) == (True, True)
    assert (middle.config.norm_head, middle.config.adapt_hf) == (False, False)
    assert small.config.rope_base == middle.config.rope_base == 1_000_000


def test_tiny_models():
    config = models.internlm2_tiny(num_layers=3).config
    assert (config.num_layers, config.num_attention_heads, config.num_kv_attention_heads) == (
        *(3, 8, 4),
    )
    assert (config.hidden_size, config.vocab_size) == (64, 512)


def test_a_preset_refuses_an_unknown_override():
    with pytest.raises(IlmCompileError, match=r"unknown field depth; known fields: num_layers"):
        models.internlm_tiny(depth=3)


def test_example_inputs():
    model = models.internlm2_tiny()
    assert model.example_inputs() == {
        "input_ids": ((1, 64), torch.int64),
        "labels": ((1, 64), torch.int64),
    }
    assert model.example_inputs(2, 16, packed=True, max_documents=3) == {
        "input_ids": ((2, 16), torch.int64),
        "labels": ((2, 16), torch.int64),
        "cu_seqlens": ((2, 4), torch.int32),
    }

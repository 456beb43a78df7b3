"""State dicts to Hugging Face's names and back, bit for bit."""

import pytest
import torch
from torch.nn import functional as F

from ilm_compile.errors import IlmCompileError
from ilm_compile.models import (
    from_hf_internlm2_state_dict,
    from_hf_llama_state_dict,
    internlm2_tiny,
    internlm_tiny,
    to_hf_internlm2_state_dict,
    to_hf_llama_state_dict,
)
from tests.support.models import randomize_

SMALL = {"num_layers": 2, "vocab_size": 64}
VARIANTS = {
    "plain": {},
    "adapt_hf=False": {"adapt_hf": False},
    "biases": {"no_bias": False},
    "biases adapt_hf=False": {"no_bias": False, "adapt_hf": False},
}
variants = pytest.mark.parametrize("fields", VARIANTS.values(), ids=list(VARIANTS))


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_internlm_round_trip_through_llama():
    model = randomize_(internlm_tiny(**SMALL))
    there = to_hf_llama_state_dict(model)
    assert_same(from_hf_llama_state_dict(model, there), model.state_dict())


@variants
def test_internlm2_round_trip_through_llama(fields):
    model = randomize_(internlm2_tiny(**SMALL, **fields))
    there = to_hf_llama_state_dict(model)
    assert_same(from_hf_llama_state_dict(model, there), model.state_dict())


@variants
def test_internlm2_round_trip_through_the_hub_names(fields):
    model = randomize_(internlm2_tiny(**SMALL, **fields))
    there = to_hf_internlm2_state_dict(model)
    assert_same(from_hf_internlm2_state_dict(model, there), model.state_dict())


def test_hub_names():
    names = to_hf_internlm2_state_dict(internlm2_tiny(**SMALL))
    assert "model.tok_embeddings.weight" in names
    assert "model.layers.1.attention.wqkv.weight" in names
    assert "model.norm.weight" in names
    assert "output.weight" in names


def test_rows_of_the_grouped_wqkv():
    """Query head j is row ((j//q)*(q+2) + j%q)*d of wqkv, key head g row (g*(q+2)+q)*d."""
    model = randomize_(internlm2_tiny(**SMALL))
    wqkv = model.layers[0].attention.wqkv.weight
    q_per_kv, head_dim = 2, 8
    out = to_hf_llama_state_dict(model)
    for j in range(8):
        row = ((j // q_per_kv) * (q_per_kv + 2) + j % q_per_kv) * head_dim
        mine = out["model.layers.0.self_attn.q_proj.weight"][j * head_dim : (j + 1) * head_dim]
        assert torch.equal(mine, wqkv[row : row + head_dim])
    for g in range(4):
        for offset, letter in enumerate("kv"):
            row = (g * (q_per_kv + 2) + q_per_kv + offset) * head_dim
            part = out[f"model.layers.0.self_attn.{letter}_proj.weight"]
            assert torch.equal(part[g * head_dim : (g + 1) * head_dim], wqkv[row : row + head_dim])


def test_hub_layout_of_an_alternating_model_computes_the_same():
    model = randomize_(internlm2_tiny(**SMALL, adapt_hf=False).double())
    halves = internlm2_tiny(**SMALL).double()
    halves.load_state_dict(
        from_hf_internlm2_state_dict(halves, to_hf_internlm2_state_dict(model)), strict=True
    )
    input_ids = torch.arange(10).reshape(2, 5)
    torch.testing.assert_close(halves(input_ids), model(input_ids), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("convert", "name"),
    [
        (to_hf_llama_state_dict, "lm_head.weight"),
        (to_hf_internlm2_state_dict, "output.weight"),
    ],
    ids=["llama", "hub"],
)
def test_norm_head_is_baked_in(convert, name):
    model = randomize_(internlm2_tiny(**SMALL, norm_head=True))
    assert torch.equal(convert(model)[name], F.normalize(model.output.weight))
    assert not torch.equal(model.output.weight, F.normalize(model.output.weight))


def test_other_tensors_can_be_given_in_the_place_of_the_weights():
    with torch.device("meta"):
        model = internlm2_tiny(**SMALL)
    tensors = randomize_(internlm2_tiny(**SMALL)).state_dict()
    assert_same(from_hf_llama_state_dict(model, to_hf_llama_state_dict(model, tensors)), tensors)


def test_stored_rotary_frequencies_are_ignored():
    model = internlm_tiny(**SMALL)
    there = to_hf_llama_state_dict(model)
    there["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    assert_same(from_hf_llama_state_dict(model, there), model.state_dict())


def test_refuses_a_missing_tensor():
    model = internlm_tiny(**SMALL)
    there = to_hf_llama_state_dict(model)
    del there["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(IlmCompileError, match=r"model.layers.1.self_attn.k_proj.bias is missing"):
        from_hf_llama_state_dict(model, there)


def test_refuses_a_tensor_without_a_place():
    model = internlm2_tiny(**SMALL)
    there = to_hf_llama_state_dict(model)
    there["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    with pytest.raises(IlmCompileError, match=r"no place for model.layers.0.self_attn.q_proj.bias"):
        from_hf_llama_state_dict(model, there)


def test_refuses_a_wrong_shape():
    model = internlm_tiny(**SMALL)
    there = to_hf_llama_state_dict(model)
    up = "model.layers.0.mlp.up_proj.weight"
    there[up] = there[up].T
    with pytest.raises(
        IlmCompileError, match=r"up_proj.weight: expected shape \(256, 64\), got \(64, 256\)"
    ):
        from_hf_llama_state_dict(model, there)


def test_refuses_post_norm_for_llama():
    with pytest.raises(IlmCompileError, match=r"apply_post_layer_norm=True cannot be expressed"):
        to_hf_llama_state_dict(internlm2_tiny(**SMALL, apply_post_layer_norm=True))


@pytest.mark.parametrize(
    "convert",
    [to_hf_internlm2_state_dict, lambda model: from_hf_internlm2_state_dict(model, {})],
    ids=["to", "from"],
)
def test_refuses_internlm_for_the_internlm2_names(convert):
    with pytest.raises(IlmCompileError, match=r"expected an InternLM2, got InternLM"):
        convert(internlm_tiny(**SMALL))

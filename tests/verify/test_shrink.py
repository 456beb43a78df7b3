"""`shrink`: a small model of the same structure, which the plan divides as the big one."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from ilm_compile.errors import PlanError
from ilm_compile.models import internlm2_7b, internlm2_20b, internlm_7b
from ilm_compile.verify.shrink import shrink

SMALL = 20_000_000


def on_meta(build):
    with torch.device("meta"):
        return build()


def hugging_face(kind, **config):
    import transformers

    made = getattr(transformers, f"{kind}Config")(**config)
    return transformers.AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize("tp", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("build", [internlm2_7b, internlm2_20b, internlm_7b])
def test_counts_keep_their_ratios_and_what_the_plan_divides(build, tp):
    big = on_meta(build)
    small = shrink(big, tp=tp, num_stages=4)
    before, after = big.config, small.config
    ratio = before.num_attention_heads // before.num_kv_attention_heads
    assert after.num_attention_heads // after.num_kv_attention_heads == ratio
    for name in ("num_attention_heads", "num_kv_attention_heads", "vocab_size"):
        is_divided = [getattr(config, name) % tp == 0 for config in (before, after)]
        assert is_divided[0] == is_divided[1], name
    assert sum(p.numel() for p in small.parameters()) < SMALL
    assert type(small) is type(big)


def test_weights_are_real_float64_and_none_is_left_at_one_or_zero():
    small = shrink(on_meta(internlm_7b), tp=2, num_stages=1)
    for name, parameter in small.named_parameters():
        assert parameter.dtype == torch.float64
        assert not parameter.eq(0).any(), name
        assert not parameter.eq(1).any(), name


def test_there_are_layers_for_every_stage():
    assert shrink(on_meta(internlm2_20b), tp=2, num_stages=16).config.num_layers == 8
    assert shrink(on_meta(internlm2_20b), tp=2, num_stages=2).config.num_layers == 2


def test_every_kind_of_layer_stays():
    kinds = ["sliding_attention"] * 3 + ["full_attention"] * 3
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "head_dim": 8}
    build = partial(hugging_face, "Gemma2", **sizes, num_hidden_layers=6, layer_types=kinds)
    small = shrink(on_meta(build), tp=2, num_stages=1)
    assert small.config.layer_types == kinds[:4]


def test_dropout_is_off_unless_it_is_kept():
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4}
    model = on_meta(partial(hugging_face, "GPT2", **sizes, resid_pdrop=0.2))
    assert shrink(model, tp=1, num_stages=1).config.resid_pdrop == 0
    assert shrink(model, tp=1, num_stages=1, keep_dropout=True).config.resid_pdrop == 0.2


class Plain(nn.Module):
    """A model without a configuration."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.dropout = nn.Dropout(0.5)


def test_a_small_model_without_a_configuration_is_taken_as_it_is():
    model = Plain(10)
    small = shrink(model, tp=2, num_stages=1)
    assert small.weight.shape == (10,)
    assert small.dropout.p == 0
    assert model.weight.eq(0).all()


@pytest.mark.parametrize("build", [partial(Plain, SMALL + 1), lambda: on_meta(partial(Plain, 10))])
def test_a_model_that_cannot_be_shrunk_is_refused(build):
    with pytest.raises(
        PlanError, match=r"and no \.config to shrink it by; pass a small real model"
    ):
        shrink(build(), tp=2, num_stages=1)

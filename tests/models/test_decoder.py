"""Mixtures of experts give what InternEvo's formulas give, written out densely.

GShard's layer sends tokens to places of a buffer (E, C) by a mask, as in arXiv:2006.16668; here the
mask is made row by row, and every token passes through every expert.
"""

import pytest
import torch
from torch.nn import functional as F

import ilm_compile
from ilm_compile.errors import IlmCompileError
from ilm_compile.models.experts import MixtureOfExperts, capacity
from tests.support.equality import decoder
from tests.support.models import random_tokens, randomize_

EXPERTS, K, TOKENS = 4, 2, 24


def layer(name, **fields):
    config = decoder(name, **fields).config
    torch.manual_seed(0)
    mixture = randomize_(MixtureOfExperts(config).double())
    x = torch.randn(2, TOKENS // 2, config.hidden_size, dtype=torch.float64, requires_grad=True)
    return mixture, x


def through_all(experts, x):
    """What each expert makes of each token: (E, T, H)."""
    each = zip(experts.w1, experts.w3, experts.w2, strict=True)
    return torch.stack([(F.silu(x @ w1) * (x @ w3)) @ w2 for w1, w3, w2 in each])


def weights_by_hand(scores, places, normalize):
    """(E, T): how much of each expert a token gets, when each takes `places` choices."""
    taken, kept = [0] * EXPERTS, []
    for choice in range(K):
        for token in range(TOKENS):
            expert = int(scores[token].argsort(descending=True)[choice])
            taken[expert] += 1
            if taken[expert] <= places:
                kept.append((expert, token))
    mask = torch.zeros(EXPERTS, TOKENS, dtype=scores.dtype)
    for expert, token in kept:
        mask[expert, token] = 1
    weights = mask * scores.t()
    return weights / weights.sum(0).clamp(min=1e-12) if normalize else weights


def by_hand(mixture, x, places, normalize=True):
    flat = x.flatten(0, 1)
    scores = (flat @ mixture.gate.wg.weight.t()).softmax(-1)
    weights = weights_by_hand(scores, places, normalize)
    return (weights.unsqueeze(-1) * through_all(mixture.experts, flat)).sum(0).view_as(x), scores


def shares(scores):
    """(K, E): the part of the tokens whose first, second, ... choice an expert is."""
    chosen = scores.argsort(-1, descending=True)[:, :K]
    return F.one_hot(chosen, EXPERTS).double().mean(0)


@pytest.mark.parametrize("places", [3, 9, 24])
def test_an_expert_takes_its_first_rows_first_choices_before_second_ones(places):
    factor = places * EXPERTS / (TOKENS * K)
    mixture, x = layer("MIXTRALMOE", capacity_factor=factor, min_capacity=1)
    assert capacity(mixture.gate.config, TOKENS) == places
    out, balance = mixture(x)
    expected, scores = by_hand(mixture, x, places)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    first = EXPERTS * (shares(scores)[0] * scores.mean(0)).sum()
    torch.testing.assert_close(balance, first, rtol=1e-12, atol=0)
    inputs = [x, *mixture.parameters()]
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum() + balance, inputs)
    wanted = torch.autograd.grad((expected * weight).sum() + first, inputs)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_without_a_capacity_no_row_is_dropped(normalize):
    mixture, x = layer("QWEN3MOE", normalize_experts=normalize, balance="all")
    out, balance = mixture(x)
    expected, scores = by_hand(mixture, x, TOKENS * K, normalize)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    every = EXPERTS * (shares(scores).mean(0) * scores.mean(0)).sum()
    torch.testing.assert_close(balance, every, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        (
            "MIXTRALMOE",
            lambda out, mlp, c: out * c.softmax(-1)[..., :1] + mlp * c.softmax(-1)[..., 1:],
        ),
        ("QWEN2MOE", lambda out, mlp, c: out + mlp * c.sigmoid()),
    ],
)
def test_shared_experts_are_weighed_as_the_type_has_it(name, mix):
    mixture, x = layer(name, num_shared_experts=2)
    alone, _ = by_hand(mixture, x, capacity(mixture.gate.config, TOKENS))
    assert mixture.residual_mlp.w1.weight.shape[0] == 2 * mixture.experts.w1.shape[2]
    expected = mix(alone, mixture.residual_mlp(x), mixture.coefficient(x))
    torch.testing.assert_close(mixture(x)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("balance", ["first", "layers"])
def test_the_routers_loss_is_part_of_the_loss(balance):
    model = decoder("QWEN2MOE", balance=balance, moe_loss_coeff=0.25).double()
    ids, labels = random_tokens(2, 12, 512)
    scores = []
    for block in model.layers:
        block.feed_forward.gate.wg.register_forward_hook(
            lambda module, inputs, logits: scores.append(logits.softmax(-1))
        )
    loss, logits = model(ids, labels=labels), model(ids)
    scores = scores[: len(model.layers)]
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    if balance == "first":
        expected = sum(EXPERTS * (shares(s)[0] * s.mean(0)).sum() for s in scores)
    else:
        share = sum(map(shares, scores)) / len(scores)
        expected = EXPERTS * (share * sum(s.mean(0) for s in scores) / len(scores)).sum()
    torch.testing.assert_close(loss, plain + 0.25 * expected, rtol=1e-12, atol=0)


def test_capacity_is_rounded_in_float32_as_there():
    config = decoder("MIXTRALMOE", capacity_factor=1.1).config
    assert capacity(config, 400) == 220  # ceil(100 * 2.2) is 221 in float64
    assert capacity(config, 4) == 4  # min_capacity


@pytest.mark.parametrize("qk_norm", [True, False])
def test_normalised_heads_forget_how_large_their_weights_are(qk_norm):
    attention = decoder("QWEN3MOE", head_dim=16, qk_norm=qk_norm).double().layers[0].attention
    assert attention.wqkv.weight.shape == ((4 + 2 * 2) * 16, 32)
    assert attention.wo.weight.shape == (32, 4 * 16)
    torch.manual_seed(0)
    x, angle = 100 * torch.randn(1, 6, 32).double(), torch.zeros(1, 6, 1, 8).double()
    before = attention(x, angle.cos(), angle.sin(), None)
    with torch.no_grad():
        attention.wqkv.weight.view(2, 4, 16, 32)[:, :3].mul_(3)  # of each group all but values
    after = attention(x, angle.cos(), angle.sin(), None)
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-6) is qk_norm


def test_one_expert_is_an_mlp_and_has_no_loss_of_its_own():
    model = decoder("QWEN2", num_experts=1, top_k=1)
    ids, labels = random_tokens(1, 8, 512)
    expected = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(model(ids, labels=labels), expected)
    assert not any("experts" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 5}, "top_k=5 must lie between 1 and num_experts=4"),
        ({"num_experts": 1, "top_k": 1, "num_shared_experts": 1}, "needs num_experts above 1"),
        ({"capacity_factor": -1.0}, "capacity_factor must not be negative"),
        ({"balance": "some"}, "must be 'first', 'all' or 'layers'"),
        ({"num_kv_attention_heads": 3}, "must be a multiple of num_kv_attention_heads=3"),
        ({"head_dim": 7}, "must be even"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, message):
    with pytest.raises(IlmCompileError, match=message):
        decoder("QWEN2MOE", **fields)


def test_a_run_of_several_micro_batches_says_that_routers_count_in_each():
    model = decoder("MIXTRALMOE")
    program = ilm_compile.partition(
        model, example_inputs=model.example_inputs(batch=2, seq=8), num_microbatches=2
    )
    assert any("computed per micro-batch" in warning for warning in program.warnings)

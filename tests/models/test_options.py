"""What the options of a config do."""

import pytest
import torch
from torch.nn import functional as F

import ilm_compile
from ilm_compile.errors import IlmCompileError
from ilm_compile.models import internlm2_tiny, internlm_tiny, to_hf_llama_state_dict
from ilm_compile.models.norm import RMSNorm
from tests.support.models import random_tokens, randomize_

SMALL = {"num_layers": 2, "hidden_size": 32, "vocab_size": 64}


def exact_norm(x, weight, eps):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()


def test_norm_in_float32_rounds_once():
    torch.manual_seed(0)
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    norm = randomize_(RMSNorm(256, eps=1e-5, fp32=True).to(torch.bfloat16))
    exact = exact_norm(x, norm.weight, 1e-5)
    out = norm(x)
    assert out.dtype == torch.bfloat16
    # The float32 result is within 1e-6 of the exact one, so it rounds to the same bf16 or, next
    # to a tie, to its neighbour.
    assert (out != exact.to(torch.bfloat16)).float().mean() < 1e-3


def test_norm_takes_a_float32_weight_in_a_bf16_model():
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    norm = randomize_(RMSNorm(32, eps=1e-5, fp32=True))
    out = norm(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("fp32", [True, False], ids=["fp32", "model dtype"])
def test_norm_never_lowers_float64(fp32):
    x = torch.randn(4, 32, dtype=torch.float64)
    norm = randomize_(RMSNorm(32, eps=1e-5, fp32=fp32).double())
    torch.testing.assert_close(norm(x), exact_norm(x, norm.weight, 1e-5), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("norm_fp32", [True, False], ids=["norm_fp32", "norm in bf16"])
def test_norm_fp32_decides_the_dtype_of_the_norms(norm_fp32):
    with torch.device("meta"):
        model = internlm2_tiny(norm_fp32=norm_fp32).to(torch.bfloat16)
        ids = torch.zeros(1, 8, dtype=torch.int64)
        graph = torch.export.export(model, (ids,), strict=False).graph
    norms = [n.meta["val"].dtype for n in graph.nodes if "rms_norm" in str(n.target)]
    assert norms == [torch.float32 if norm_fp32 else torch.bfloat16] * 9


@pytest.mark.parametrize("make", [internlm_tiny, internlm2_tiny], ids=["internlm", "internlm2"])
def test_bf16_model_is_close_to_float32(make):
    model = randomize_(make(**SMALL))
    input_ids, labels = random_tokens(2, 12, 64)
    expected = model(input_ids, labels=labels)
    low = model.to(torch.bfloat16)
    assert low(input_ids).dtype == torch.bfloat16
    loss = low(input_ids, labels=labels)
    assert loss.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert all(p.grad.dtype == torch.bfloat16 for p in low.parameters())


@pytest.mark.parametrize("make", [internlm_tiny, internlm2_tiny], ids=["internlm", "internlm2"])
def test_embed_grad_scale_scales_embedding_and_head_gradients_only(make):
    scaled, plain = (randomize_(make(**SMALL, embed_grad_scale=s).double()) for s in (0.25, 1.0))
    input_ids, labels = random_tokens(2, 12, 64)
    losses = [model(input_ids, labels=labels) for model in (scaled, plain)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    for loss in losses:
        loss.backward()
    for (name, mine), other in zip(scaled.named_parameters(), plain.parameters(), strict=True):
        ends = name.split(".")[0] in ("embedding", "head", "tok_embeddings", "output")
        expected = other.grad * 0.25 if ends else other.grad
        torch.testing.assert_close(mine.grad, expected, rtol=1e-10, atol=1e-13)


def test_norm_head_makes_the_length_of_head_rows_irrelevant():
    model = randomize_(internlm2_tiny(**SMALL, norm_head=True).double())
    input_ids, _ = random_tokens(2, 12, 64)
    before = model(input_ids)
    with torch.no_grad():
        model.output.weight.mul_(3)
    torch.testing.assert_close(model(input_ids), before, rtol=1e-10, atol=1e-12)


def test_post_norm_block():
    model = randomize_(internlm2_tiny(**SMALL, apply_post_layer_norm=True).double())
    assert "norm.weight" not in dict(model.named_parameters())
    block = model.layers[0]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    cos, sin = torch.ones(1, 5, 1, 2).double(), torch.zeros(1, 5, 1, 2).double()
    middle = block.attention_norm(x + block.attention(x, cos, sin, None))
    expected = block.ffn_norm(middle + block.feed_forward(middle))
    assert torch.equal(block(x, cos, sin, None), expected)

    hidden = []
    model.layers[-1].register_forward_hook(lambda module, args, out: hidden.append(out))
    logits = model(torch.arange(10).reshape(2, 5))
    assert torch.equal(logits, F.linear(hidden[0], model.output.weight))


@pytest.mark.parametrize("make", [internlm_tiny, internlm2_tiny])
def test_norm_type_layernorm_is_that_of_torch(make):
    model = make(**SMALL, norm_type="layernorm", layer_norm_epsilon=1e-3)
    assert not model.norm.bias.any()
    x = 3 + torch.randn(5, 32)
    oracle = torch.nn.LayerNorm(32, eps=1e-3)
    oracle.load_state_dict(randomize_(model.norm).state_dict())
    torch.testing.assert_close(model.norm(x), oracle(x))
    kinds = {name.rpartition(".")[0] for name, p in model.named_parameters() if "norm" in name}
    assert all(f"{kind}.bias" in dict(model.named_parameters()) for kind in kinds)


@pytest.mark.parametrize("make", [internlm_tiny, internlm2_tiny])
def test_a_model_with_layernorm_is_no_llama(make):
    with pytest.raises(IlmCompileError, match="LlamaForCausalLM has RMSNorm"):
        to_hf_llama_state_dict(make(**SMALL, norm_type="layernorm"))


def test_a_model_with_layernorm_is_proven_in_parallel():
    model = internlm2_tiny(**SMALL, norm_type="layernorm", multiple_of=32)
    report = ilm_compile.verify(model, tp=2, pp=2, sequence_parallel=True)
    report.raise_if_failed()


@pytest.mark.parametrize(("multiple", "width"), [(256, 256), (32, 96), (7, 91)])
def test_the_width_of_an_mlp_is_rounded_up_to_a_multiple(multiple, width):
    model = internlm_tiny(**SMALL, mlp_ratio=8 / 3, multiple_of=multiple)
    assert model.blocks[0].mlp.w1.weight.shape == (width, 32)


def test_labels_are_targets_of_their_own_position():
    model = randomize_(internlm2_tiny(**SMALL).double())
    input_ids, labels = random_tokens(2, 12, 64)
    log_probabilities = model(input_ids).log_softmax(-1)
    picked = [
        log_probabilities[b, t, labels[b, t]]
        for b in range(2)
        for t in range(12)
        if labels[b, t] != -100
    ]
    expected = -torch.stack(picked).mean()
    torch.testing.assert_close(model(input_ids, labels=labels), expected, rtol=1e-12, atol=0)


def test_rotary_depends_on_its_base():
    models = [randomize_(internlm2_tiny(**SMALL, rope_base=b)) for b in (1e4, 1e6)]
    input_ids, _ = random_tokens(1, 12, 64)
    assert not torch.allclose(models[0](input_ids), models[1](input_ids))

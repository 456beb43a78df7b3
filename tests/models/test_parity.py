"""Our models equal Hugging Face's LlamaForCausalLM in float64, logits and every gradient."""

import pytest
import torch
from torch.nn import functional as F

from ilm_compile.models import internlm2_tiny, internlm_tiny, to_hf_llama_state_dict
from tests.support.models import hf_llama_like, random_tokens, randomize_
from tests.support.promote import promoted_float32

pytest.importorskip("transformers")

SMALL = {"num_layers": 2, "vocab_size": 64}
MODELS = {
    "internlm": lambda: internlm_tiny(**SMALL),
    "internlm2": lambda: internlm2_tiny(**SMALL),
    "internlm2 adapt_hf=False": lambda: internlm2_tiny(**SMALL, adapt_hf=False),
    "internlm2 one kv head": lambda: internlm2_tiny(**SMALL, num_kv_attention_heads=1),
    "internlm2 as many kv heads": lambda: internlm2_tiny(**SMALL, num_kv_attention_heads=8),
    "internlm2 biases": lambda: internlm2_tiny(**SMALL, no_bias=False),
    "internlm2 biases adapt_hf=False": lambda: internlm2_tiny(
        **SMALL, no_bias=False, adapt_hf=False
    ),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))


def equal(actual, expected):
    """Relative to the largest element: 1e-10."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * scale)


@models
def test_logits_and_gradients_equal_hugging_face(make):
    model = randomize_(make().double())
    llama = hf_llama_like(model)
    llama.load_state_dict(to_hf_llama_state_dict(model), strict=True)
    input_ids, labels = random_tokens(2, 12, model.config.vocab_size)

    model(input_ids, labels=labels).backward()
    with promoted_float32():
        logits = llama(input_ids=input_ids).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()

    equal(model(input_ids), logits)
    ours = to_hf_llama_state_dict(model, {n: p.grad for n, p in model.named_parameters()})
    theirs = {name: parameter.grad for name, parameter in llama.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        equal(ours[name], grad)


def test_norm_head_is_baked_into_the_hugging_face_head():
    model = randomize_(internlm2_tiny(**SMALL, norm_head=True).double())
    llama = hf_llama_like(model)
    llama.load_state_dict(to_hf_llama_state_dict(model), strict=True)
    input_ids, labels = random_tokens(2, 12, model.config.vocab_size)

    model(input_ids, labels=labels).backward()
    with promoted_float32():
        logits = llama(input_ids=input_ids).logits
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()

    equal(model(input_ids), logits)
    # d(w / |w|) takes from the gradient its part along w and divides by |w|.
    weight, grad = model.output.weight.detach(), llama.lm_head.weight.grad
    length = weight.norm(dim=1, keepdim=True)
    unit = weight / length
    along = (grad * unit).sum(1, keepdim=True) * unit
    equal(model.output.weight.grad, (grad - along) / length)


def test_positions_shift_equals_hugging_face():
    model = randomize_(internlm2_tiny(**SMALL).double())
    llama = hf_llama_like(model)
    llama.load_state_dict(to_hf_llama_state_dict(model), strict=True)
    input_ids, _ = random_tokens(2, 12, model.config.vocab_size)
    position_ids = torch.stack((torch.arange(12) * 3, torch.arange(5, 17)))
    with promoted_float32():
        logits = llama(input_ids=input_ids, position_ids=position_ids).logits
    equal(model(input_ids, position_ids), logits)

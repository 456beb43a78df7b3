"""Small models with weights of ordinary size, for tests."""

from typing import Any

import torch
from torch import Tensor, nn

from ilm_compile.models import InternLM, InternLM2
from tests.support.promote import to_float64


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every parameter anew, norms and biases too, so that none can be mixed up unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            mean = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(mean + 0.1 * noise)
    return model


def random_tokens(batch: int, seq: int, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """input_ids and labels, one label in five ignored: (batch, seq) int64 each."""
    generator = torch.Generator().manual_seed(seed)
    input_ids, labels, lottery = (
        torch.randint(high, (batch, seq), generator=generator)
        for high in (vocab_size, vocab_size, 5)
    )
    return input_ids, labels.masked_fill(lottery == 0, -100)


def hf_llama_like(model: InternLM | InternLM2, **fields: Any) -> nn.Module:
    """A Hugging Face LlamaForCausalLM of the sizes of `model`, in float64, with its own weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    names = dict(model.named_parameters())
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_kv_attention_heads,
            vocab_size=config.vocab_size,
            rms_norm_eps=config.layer_norm_epsilon,
            attention_bias=any(name.endswith("bias") for name in names),
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            **fields,
        )
    )
    return to_float64(llama)

"""The `config.json` with which transformers builds a Llama that computes what our model does."""

from __future__ import annotations

import json

import torch
from torch import nn

from ilm_compile.models import InternLM, InternLM2


def hf_llama_config(model: nn.Module, dtype: torch.dtype | None) -> dict[str, str]:
    """The file by name; of an InternLM or InternLM2. dtype: of the weights, if it is known."""
    assert isinstance(model, InternLM | InternLM2)
    config = model.config
    has_bias = isinstance(model, InternLM) or any("bias" in n for n, _ in model.named_parameters())
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_kv_attention_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.layer_norm_epsilon,
        # The first for transformers 5, the second for those before.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "attention_bias": has_bias,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    if dtype is not None:
        fields["dtype"] = str(dtype).removeprefix("torch.")
    return {"config.json": json.dumps(fields, indent=2) + "\n"}

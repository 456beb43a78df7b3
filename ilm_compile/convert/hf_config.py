"""The `config.json` with which transformers builds a Llama that computes what our model does."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.models import InternLM, InternLM2


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Tokens around a text: before it, after it, and what fills up a row; None for none."""

    begin: int | None = None
    end: int | None = None
    padding: int | None = None


def hf_llama_config(
    model: nn.Module, dtype: torch.dtype | None, tokens: SpecialTokens
) -> dict[str, str]:
    """The file by name; of an InternLM or InternLM2. dtype: of the weights, if it is known.

    Raises `IlmCompileError` for a token that the model has not.
    """
    assert isinstance(model, InternLM | InternLM2)
    config = model.config
    for token in (tokens.begin, tokens.end, tokens.padding):
        if token is not None and token >= config.vocab_size:
            raise IlmCompileError(
                f"convert: the tokenizer has a token {token}, the model only {config.vocab_size}; "
                "give the tokenizer that it was trained with"
            )
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
        # Llama's own numbers, 1 and 2, would be taken for keys that are left out.
        "bos_token_id": tokens.begin,
        "eos_token_id": tokens.end,
        "pad_token_id": tokens.padding,
    }
    if dtype is not None:
        fields["dtype"] = str(dtype).removeprefix("torch.")
    return {"config.json": json.dumps(fields, indent=2) + "\n"}

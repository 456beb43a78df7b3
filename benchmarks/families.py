"""Small models of eight families, of given sizes, for benchmarks that train them.

Eight heads; the width inside an MLP is 3.5 times the hidden size where a family leaves it open, as
in InternLM2-7B, else the family's own. No dropout, no cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.common import make_model

INTERNLM2, HEADS, KV_HEADS, VOCAB = "InternLM2", 8, 2, 2048
HUGGING_FACE = {
    "Llama": "LlamaForCausalLM",
    "GPT-2": "GPT2LMHeadModel",
    "Qwen2": "Qwen2ForCausalLM",
    "GPT-NeoX": "GPTNeoXForCausalLM",
    "Gemma": "GemmaForCausalLM",
    "Mistral": "MistralForCausalLM",
    "Phi-3": "Phi3ForCausalLM",
}
FAMILIES = (INTERNLM2, *HUGGING_FACE)


def make_family(name: str, *, hidden: int, layers: int, dtype: torch.dtype) -> nn.Module:
    """The model of a family, with the same values each time, in training mode."""
    torch.manual_seed(0)
    if name == INTERNLM2:
        sizes = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": HEADS}
        fields = {**sizes, "num_kv_attention_heads": KV_HEADS, "vocab_size": VOCAB}
        model: nn.Module = make_model(
            "internlm2_tiny", {**fields, "mlp_ratio": 3.5, "multiple_of": 8}, device="cpu"
        )
        return model.to(dtype).train()
    import transformers

    model_class: Any = getattr(transformers, HUGGING_FACE[name])
    default = model_class.config_class()
    wanted = {
        "hidden_size": hidden,
        "intermediate_size": 7 * hidden // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": hidden // HEADS,
        "vocab_size": VOCAB,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
        "use_cache": False,
    }
    wanted |= {n: 0.0 for n, v in vars(default).items() if "drop" in n and isinstance(v, float)}
    given = {n: value for n, value in wanted.items() if hasattr(default, n)}
    built: nn.Module = model_class(model_class.config_class(**given)).to(dtype).train()
    return built

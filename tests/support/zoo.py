"""Small Hugging Face causal language models, of every architecture that transformers knows.

A small configuration is made from an architecture's default one: sizes are recognised by their
names (`SIZES`), dropout is off, and what does not fit then is set by hand (`CHANGES`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

SEQ, VOCAB = 16, 512
LAYERS = 2
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS = 64, 8, 4, 8, 128, 4

_NAMES: dict[int | str, str] = {
    "layers": """
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks
        num_decoder_layers num_encoder_layers depth""",
    HIDDEN: """
        hidden_size n_embd d_model word_embed_proj_dim embedding_size emb_dim embedding_dim
        dim_model input_embedding_size output_embedding_size lru_width embed_dim attn_hidden_size
        hidden_size_global max_position_embeddings n_positions n_ctx max_seq_len context_length
        model_max_length max_target_positions""",
    FFN: """
        intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim moe_intermediate_size
        shared_intermediate_size shared_expert_intermediate_size intermediate_size_mlp dim_ff dff
        ffn_hidden_size expert_ffn_hidden_size moe_shared_expert_intermediate_size block_ffn_dim
        feed_forward_size d_inner dense_intermediate_size shared_experts_intermediate_size
        attention_hidden_size attention_head_size mamba_d_ssm""",
    HEADS: """
        num_attention_heads n_head n_heads num_heads attention_heads index_n_heads
        decoder_attention_heads encoder_attention_heads num_encoder_attention_heads
        num_decoder_attention_heads swa_num_attention_heads n_mamba_heads mamba_n_heads
        mamba_num_heads linear_num_value_heads linear_num_heads
        head_dim kv_channels qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim dim_head
        index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim d_head
        global_head_dim sliding_window sliding_window_size attention_chunk_size window_size
        local_attention attention_window_size""",
    KV_HEADS: """
        num_key_value_heads num_kv_heads num_query_groups swa_num_key_value_heads
        linear_num_key_heads num_experts n_routed_experts num_local_experts moe_num_experts
        rotary_dim""",
    SEQ: """
        attention_head_dim mamba_d_head mamba_head_dim chunk_size mamba_chunk_size index_topk
        kv_lora_rank q_lora_rank o_lora_rank""",
    2: "num_experts_per_tok moe_topk num_experts_per_token moe_k",
    1: """
        n_group topk_group num_expert_group n_shared_experts num_shared_experts
        moe_num_shared_experts first_k_dense_replace""",
    0: "num_kv_shared_layers",
    VOCAB: """
        vocab_size decoder_vocab_size unpadded_vocab_size vocab_size_per_layer_input
        encoder_hash_byte_group_vocab""",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
TOKENS = {"pad": 0, "bos": 1, "eos": 2}

# What the sizes leave inconsistent, by model type.
CHANGES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {
            **{"hidden_size": HIDDEN, "ffn_hidden_size": FFN},
            **{"moe_num_experts": EXPERTS, "moe_top_k": 2},
        },
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "qwen4_exp_text": {
        **{"indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM},
        **{"indexer_budget": SEQ, "indexer_compress_ratio": 4},
    },
    "reformer": {
        **{"axial_pos_embds": False, "num_buckets": 4, "attn_layers": ["local", "lsh"]},
        **{"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 2 * HEAD_DIM},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {
        **{"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Listed:
    """A model that tables and tests name.

    `small` changes its small configuration; `full` its default one, where that has a number of
    heads that 8 does not divide.
    """

    architecture: str
    config: str = ""  # the configuration class, if it is not the architecture's own
    small: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)


LISTED = {
    "Llama": Listed("LlamaForCausalLM"),
    "InternLM3": Listed("LlamaForCausalLM", "InternLM3Config", small={"num_key_value_heads": 2}),
    "GPT-2": Listed("GPT2LMHeadModel", full={"n_embd": 1024, "n_head": 16}),
    "Qwen2": Listed("Qwen2ForCausalLM"),
    "Qwen3": Listed("Qwen3ForCausalLM"),
    "Mistral": Listed("MistralForCausalLM"),
    "Gemma": Listed("GemmaForCausalLM"),
    "Phi-3": Listed("Phi3ForCausalLM"),
    "GPT-NeoX": Listed("GPTNeoXForCausalLM"),
    "OPT": Listed("OPTForCausalLM", full={"hidden_size": 1024, "num_attention_heads": 16}),
    "Falcon": Listed(
        "FalconForCausalLM",
        small={"new_decoder_architecture": True},
        full={
            **{"hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8},
            "new_decoder_architecture": True,
        },
    ),
    "BLOOM": Listed("BloomForCausalLM", full={"hidden_size": 4096, "n_head": 32}),
    "OLMo-2": Listed("Olmo2ForCausalLM"),
    "Mixtral": Listed("MixtralForCausalLM"),
}
# Mixtures of experts: top-k by softmax and by sigmoid, groups of experts and their bias, shared
# experts, biases of experts, experts multiplied as a batch.
EXPERTS_LISTED = {
    "Qwen3-MoE": Listed("Qwen3MoeForCausalLM"),
    "OLMoE": Listed("OlmoeForCausalLM"),
    "DeepSeek-V3": Listed("DeepseekV3ForCausalLM"),
    "GLM-4-MoE": Listed("Glm4MoeForCausalLM"),
    "GPT-OSS": Listed("GptOssForCausalLM"),
    "dots.llm1": Listed("Dots1ForCausalLM"),
    "ERNIE-4.5-MoE": Listed("Ernie4_5_MoeForCausalLM"),
    "Granite-MoE": Listed("GraniteMoeForCausalLM"),
    "MiniMax": Listed("MiniMaxForCausalLM"),
    "Llama-4": Listed("Llama4ForCausalLM"),
    "Qwen2-MoE": Listed("Qwen2MoeForCausalLM"),
    "Jamba": Listed("JambaForCausalLM"),
}
# Gates and rotary positions of other kinds: what the passes that fuse must know.
FUSED_LISTED = {
    "Gemma-2": Listed("Gemma2ForCausalLM"),
    "GPT-J": Listed("GPTJForCausalLM"),
    "Cohere": Listed("CohereForCausalLM"),
    "GLM-4": Listed("Glm4ForCausalLM"),
}


def architectures() -> list[str]:
    """Return the class names of all causal language models of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()), key=str.lower)


def small_model(architecture: str, config_name: str = "", **changes: Any) -> nn.Module:
    """Return a small float64 model, the same each time, no parameter at its initial value."""
    import transformers

    model_class = getattr(transformers, architecture)
    # A release from before a configuration class maps to this model: its own, with the same values.
    config_class = getattr(transformers, config_name or "", model_class.config_class)
    config = config_class(**small_values(config_class, **changes))
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    return float64(lambda: model_class(config))


def float64(make: Callable[[], nn.Module]) -> nn.Module:
    """Return the model in float64, the same each time, no parameter at its initial value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def listed_model(name: str, *, layers: int = LAYERS) -> nn.Module:
    """Return a small float64 model of those listed."""
    listed = (LISTED | EXPERTS_LISTED | FUSED_LISTED)[name]
    return small_model(listed.architecture, listed.config, layers=layers, **listed.small)


def full_model(name: str, *, layers: int) -> nn.Module:
    """Return a model of those in `LISTED` on the meta device, of full width and without dropout."""
    import transformers

    listed = LISTED[name]
    model_class = getattr(transformers, listed.architecture)
    config_class = getattr(transformers, listed.config or "", model_class.config_class)
    values = config_class().to_dict()
    changes = {n: layers for n in values if SIZES.get(n) == "layers"}
    changes |= {n: 0.0 for n, v in values.items() if "drop" in n and isinstance(v, float)}
    with torch.device("meta"):
        model: nn.Module = model_class(config_class(**{**changes, **listed.full}))
    return model


def small_values(config_class: Any, *, layers: int = LAYERS, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a small configuration of `config_class`, with `changes` to it."""
    default = config_class()
    given = default.to_dict()
    kinds = {name: _kinds(given, name) for name in ("layer_types", "mlp_layer_types")}
    layers = max(layers, *map(len, kinds.values()))
    values: dict[str, Any] = {"pad_token_id": 0}
    for name, value in given.items():
        if name in SIZES and isinstance(value, int):
            size = SIZES[name]
            values[name] = layers if size == "layers" else size
        elif kinds.get(name):
            values[name] = [kinds[name][i * len(kinds[name]) // layers] for i in range(layers)]
        elif "drop" in name and isinstance(value, float):
            values[name] = 0.0
        elif name.endswith("_token_id") and isinstance(value, int | list):
            values[name] = TOKENS.get(name.removesuffix("_token_id"), 3)
        elif name in default.sub_configs and getattr(default, name) is not None:
            values[name] = small_values(type(getattr(default, name)), layers=layers)
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # each has a key of its own
    return {**values, **CHANGES.get(config_class.model_type, {}), **changes}


def _kinds(config: dict[str, Any], name: str) -> list[str]:
    """Return the distinct kinds of layers that a configuration lists, in order."""
    return list(dict.fromkeys(config.get(name) or []))

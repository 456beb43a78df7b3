"""Models of PyPI's litgpt, x-transformers and peft, as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from benchmarks.outside.entry import (
    BY_ROW,
    PP_DP,
    SEQ,
    TP_DP,
    TP_PP,
    VOCAB,
    WHOLE,
    Outside,
    class_loss,
    classified_images,
    token_loss,
    tokens,
)
from tests.support.zoo import float64, listed_model

WORDS = 96
SIZES = {
    **{"n_layer": 2, "n_embd": 32, "n_head": 4, "block_size": 24, "vocab_size": WORDS},
    **{"padded_vocab_size": WORDS, "head_size": 8, "intermediate_size": 64},
}


def lit(name: str, **changes: Any) -> nn.Module:
    """Return litgpt's model of a published name, made small; a LoRA of it if `lora_r` is given."""
    import litgpt
    from litgpt import lora

    is_lora = "lora_r" in changes
    config = (lora if is_lora else litgpt).Config.from_name(name, **{**SIZES, **changes})
    model = (lora if is_lora else litgpt).GPT(config)
    if is_lora:
        lora.mark_only_lora_as_trainable(model)
    return model


def wrapper(attention: str, **options: Any) -> nn.Module:
    """Return x-transformers' TransformerWrapper over a Decoder or an Encoder with `options`."""
    import x_transformers

    layers = getattr(x_transformers, attention)(
        dim=32, depth=2, heads=4, attn_dim_head=8, **options
    )
    return x_transformers.TransformerWrapper(num_tokens=WORDS, max_seq_len=24, attn_layers=layers)


def encoder_decoder() -> nn.Module:
    import x_transformers

    sizes = {"num_tokens": WORDS, "depth": 2, "heads": 4, "max_seq_len": 24}
    prefixed = {f"{side}_{name}": size for side in ("enc", "dec") for name, size in sizes.items()}
    return x_transformers.XTransformer(dim=32, tie_token_emb=True, **prefixed)


def vision() -> nn.Module:
    import x_transformers

    layers = x_transformers.Encoder(dim=32, depth=2, heads=4, attn_dim_head=8)
    return x_transformers.ViTransformerWrapper(
        image_size=16, patch_size=4, num_classes=10, attn_layers=layers
    )


def adapted(base: str, kind: str, **options: Any) -> nn.Module:
    """Return peft's adapter of a `kind` over a small model of transformers."""
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(listed_model(base), config)


def litgpt(layout: str, name: str, *, refusal: str = "", **changes: Any) -> Outside:
    return Outside(
        "litgpt", partial(float64, partial(lit, name, **changes)), layout,
        tokens("idx", vocab=WORDS), token_loss, refusal=refusal,
    )  # fmt: skip


def x_transformers(layout: str, attention: str = "Decoder", **options: Any) -> Outside:
    return Outside(
        "x-transformers", partial(float64, partial(wrapper, attention, **options)), layout,
        tokens("x", vocab=WORDS), token_loss,
    )  # fmt: skip


def peft(layout: str, base: str, kind: str, **options: Any) -> Outside:
    build = partial(float64, partial(adapted, base, kind, **options))
    return Outside("peft", build, layout, tokens(seq=SEQ, vocab=VOCAB))


_LORA = {
    **{"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
    **{f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp", "head")},
}
_MOE = {"n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 64}

PACKAGES = {
    "litgpt Llama 3.2": litgpt(TP_PP, "Llama-3.2-1B", n_query_groups=2),
    "litgpt Pythia": litgpt(TP_PP, "pythia-14m"),
    "litgpt Gemma 2": litgpt(TP_DP, "Gemma-2-2b", n_query_groups=2),
    "litgpt Phi-2": litgpt("tp=4", "phi-2"),
    "litgpt Falcon": litgpt(TP_DP, "falcon-7b", n_query_groups=1),
    "litgpt Qwen 2.5": litgpt(PP_DP, "Qwen2.5-0.5B", n_query_groups=2),
    "litgpt OLMo 2": litgpt(TP_PP, "OLMo-2-1124-7B", n_query_groups=4),
    "litgpt StableLM": litgpt(TP_DP, "stablelm-base-alpha-3b"),
    "litgpt Mixtral": litgpt(
        TP_DP, "Mixtral-8x7B-v0.1", n_query_groups=2, refusal=BY_ROW, **_MOE
    ),
    "litgpt Llama 3.2, LoRA": litgpt(TP_PP, "Llama-3.2-1B", n_query_groups=2, **_LORA),
    "litgpt Pythia, LoRA": litgpt("dp=4, zero=3", "pythia-14m", **_LORA),
    "x-transformers, rotary": x_transformers(TP_PP, rotary_pos_emb=True, attn_flash=True),
    "x-transformers, ALiBi": x_transformers(TP_DP, alibi_pos_bias=True, alibi_num_heads=2),
    "x-transformers, T5 bias": x_transformers(TP_PP, rel_pos_bias=True),
    "x-transformers, LLaMA-like": x_transformers(
        TP_PP, rotary_pos_emb=True, ff_glu=True, ff_swish=True, use_rmsnorm=True, ff_no_bias=True
    ),
    "x-transformers, one key head": x_transformers(TP_DP, attn_one_kv_head=True),
    "x-transformers, normed keys": x_transformers(TP_PP, attn_qk_norm=True),
    "x-transformers, talking heads": x_transformers(
        TP_DP, attn_pre_talking_heads=True, attn_post_talking_heads=True, gate_residual=True
    ),
    "x-transformers, sandwich": x_transformers(TP_PP, sandwich_coef=1, shift_tokens=1),
    "x-transformers, encoder": x_transformers("tp=4", "Encoder"),
    "x-transformers, XTransformer": Outside(
        "x-transformers", partial(float64, encoder_decoder), WHOLE,
        tokens("src", vocab=WORDS, labels="tgt", ignored=-100),
    ),
    "x-transformers, vision": Outside(
        "x-transformers", partial(float64, vision), TP_PP, classified_images, class_loss
    ),
    "peft LoRA of Llama": peft(
        TP_PP, "Llama", "LoraConfig", r=4, target_modules=["q_proj", "v_proj"]
    ),
    "peft LoRA of GPT-2": peft(TP_DP, "GPT-2", "LoraConfig", r=4, target_modules=["c_attn"]),
    "peft LoRA of Qwen2, all linears": peft(
        "dp=4, zero=3", "Qwen2", "LoraConfig", r=4, target_modules="all-linear"
    ),
    "peft DoRA of Mistral": peft(
        TP_PP, "Mistral", "LoraConfig", r=4, use_dora=True, target_modules=["q_proj", "v_proj"]
    ),
    "peft IA3 of GPT-NeoX": peft(TP_DP, "GPT-NeoX", "IA3Config"),
    "peft LoRA of Gemma, head trained": peft(
        PP_DP, "Gemma", "LoraConfig", r=4, target_modules=["q_proj"], modules_to_save=["norm"]
    ),
    "peft prompt tuning of Llama": peft(
        TP_PP, "Llama", "PromptTuningConfig", num_virtual_tokens=4
    ),
    "peft prefix tuning of Llama": peft(
        TP_DP, "Llama", "PrefixTuningConfig", num_virtual_tokens=4
    ),
    "peft VeRA of Llama": peft(
        TP_DP, "Llama", "VeraConfig", r=4, target_modules=["q_proj"], save_projection=True
    ),
}  # fmt: skip

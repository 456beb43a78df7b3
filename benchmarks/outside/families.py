"""Every family of transformers' language models, small, from its own configuration class."""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.outside.entry import BY_ROW, CHUNKS, PP_DP, TP_DP, TP_PP, Outside
from tests.support.zoo import small_model

SOURCE = "transformers"


def family(
    architecture: str, layout: str = TP_PP, *, config: str = "", refusal: str = "", **small: Any
) -> Outside:
    """Return a class of transformers; `small` changes its small configuration."""
    build = partial(small_model, architecture, config, **small)
    return Outside(SOURCE, build, layout, refusal=refusal)


FAMILIES = {
    "Llama": family("LlamaForCausalLM", CHUNKS, layers=4),
    "Llama 4": family("Llama4ForCausalLM", TP_DP),
    "InternLM3": family("LlamaForCausalLM", TP_DP, config="InternLM3Config"),
    "Mistral": family("MistralForCausalLM", "tp=4"),
    "Mixtral": family("MixtralForCausalLM"),
    "Qwen2": family("Qwen2ForCausalLM", PP_DP),
    "Qwen2-MoE": family("Qwen2MoeForCausalLM", TP_DP),
    "Qwen3": family("Qwen3ForCausalLM", "dp=4, zero=3"),
    "Qwen3-MoE, decoder_sparse_step=4": family(
        "Qwen3MoeForCausalLM", layers=4, decoder_sparse_step=4
    ),
    "Qwen3-Next": family("Qwen3NextForCausalLM", TP_DP),
    "DeepSeek V2": family("DeepseekV2ForCausalLM"),
    "DeepSeek V3": family("DeepseekV3ForCausalLM", TP_DP),
    "Gemma": family("GemmaForCausalLM", "tp=4"),
    "Gemma 2": family("Gemma2ForCausalLM"),
    "Gemma 3": family("Gemma3ForCausalLM", TP_DP),
    "Phi": family("PhiForCausalLM"),
    "Phi-3": family("Phi3ForCausalLM", "tp=4"),
    "Phi-MoE": family("PhimoeForCausalLM", TP_DP, refusal="its router draws random numbers"),
    "GPT-2": family("GPT2LMHeadModel", "pp=4", layers=4),
    "GPT-Neo": family("GPTNeoForCausalLM"),
    "GPT-J": family("GPTJForCausalLM", TP_DP),
    "GPT-NeoX": family("GPTNeoXForCausalLM"),
    "GPT-BigCode": family("GPTBigCodeForCausalLM"),
    "CodeGen": family("CodeGenForCausalLM", PP_DP),
    "StarCoder2": family("Starcoder2ForCausalLM"),
    "Falcon": family("FalconForCausalLM", "tp=4", new_decoder_architecture=True),
    "Falcon, one key head": family("FalconForCausalLM", TP_PP),
    "BLOOM": family("BloomForCausalLM"),
    "OPT": family("OPTForCausalLM", TP_DP),
    "MPT": family("MptForCausalLM"),
    "XGLM": family("XGLMForCausalLM", TP_DP),
    "BioGPT": family("BioGptForCausalLM", PP_DP),
    "StableLM": family("StableLmForCausalLM"),
    "Persimmon": family("PersimmonForCausalLM", "tp=4"),
    "Cohere": family("CohereForCausalLM"),
    "Cohere 2": family("Cohere2ForCausalLM", TP_DP),
    "OLMo": family("OlmoForCausalLM"),
    "OLMo 2": family("Olmo2ForCausalLM", "tp=4"),
    "OLMoE": family("OlmoeForCausalLM"),
    "SmolLM3, 8 layers": family(
        "SmolLM3ForCausalLM",
        CHUNKS,
        layers=8,
        no_rope_layers=[1, 1, 1, 0] * 2,
    ),
    "Granite": family("GraniteForCausalLM"),
    "Granite-MoE": family("GraniteMoeForCausalLM", TP_DP),
    "Nemotron": family("NemotronForCausalLM"),
    "GLM": family("GlmForCausalLM"),
    "GLM-4": family("Glm4ForCausalLM", TP_DP),
    "Helium": family("HeliumForCausalLM"),
    "EXAONE 4": family("Exaone4ForCausalLM", TP_DP),
    "Seed-OSS": family("SeedOssForCausalLM", "tp=4"),
    "ERNIE 4.5": family("Ernie4_5ForCausalLM"),
    "Mamba": family("MambaForCausalLM"),
    "Mamba 2": family("Mamba2ForCausalLM", TP_DP),
    "Falcon-Mamba": family("FalconMambaForCausalLM", PP_DP),
    "RWKV-4": family("RwkvForCausalLM", PP_DP),
    "GPT-OSS": family("GptOssForCausalLM"),
    "OLMo 3": family("Olmo3ForCausalLM", TP_DP),
    "LFM2": family("Lfm2ForCausalLM"),
    "DBRX": family("DbrxForCausalLM", TP_DP, refusal=BY_ROW),
    "MiniMax": family("MiniMaxForCausalLM", TP_DP),
    "Gemma 3n": family("Gemma3nForCausalLM", TP_DP, refusal="it writes to its weights in forward"),
    "Zamba 2": family("Zamba2ForCausalLM", PP_DP),
    "Jamba": family("JambaForCausalLM", use_cache=False),
    "RecurrentGemma": family("RecurrentGemmaForCausalLM", TP_DP, use_cache=False),
}

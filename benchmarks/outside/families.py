"""Every family of transformers' language models, small, from its own configuration class."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks.outside.entry import BY_ROW, CHUNKS, PP_DP, TP_DP, TP_PP, Outside
from tests.support.zoo import small_model

SOURCE = "transformers"


@dataclass(frozen=True)
class Family:
    """A class of transformers; `small` changes its small configuration."""

    architecture: str
    layout: str = TP_PP
    small: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    refusal: str = ""

    def outside(self) -> Outside:
        return Outside(
            SOURCE,
            partial(small_model, self.architecture, self.config, **self.small),
            self.layout,
            refusal=self.refusal,
        )


_FAMILIES = {
    "Llama": Family("LlamaForCausalLM", CHUNKS, {"layers": 4}),
    "Llama 4": Family("Llama4ForCausalLM", TP_DP),
    "InternLM3": Family("LlamaForCausalLM", TP_DP, config="InternLM3Config"),
    "Mistral": Family("MistralForCausalLM", "tp=4"),
    "Mixtral": Family("MixtralForCausalLM"),
    "Qwen2": Family("Qwen2ForCausalLM", PP_DP),
    "Qwen2-MoE": Family("Qwen2MoeForCausalLM", TP_DP),
    "Qwen3": Family("Qwen3ForCausalLM", "dp=4, zero=3"),
    "Qwen3-MoE, decoder_sparse_step=4": Family(
        "Qwen3MoeForCausalLM", small={"layers": 4, "decoder_sparse_step": 4}
    ),
    "Qwen3-Next": Family("Qwen3NextForCausalLM", TP_DP),
    "DeepSeek V2": Family("DeepseekV2ForCausalLM"),
    "DeepSeek V3": Family("DeepseekV3ForCausalLM", TP_DP),
    "Gemma": Family("GemmaForCausalLM", "tp=4"),
    "Gemma 2": Family("Gemma2ForCausalLM"),
    "Gemma 3": Family("Gemma3ForCausalLM", TP_DP),
    "Phi": Family("PhiForCausalLM"),
    "Phi-3": Family("Phi3ForCausalLM", "tp=4"),
    "Phi-MoE": Family("PhimoeForCausalLM", TP_DP, refusal="its router draws random numbers"),
    "GPT-2": Family("GPT2LMHeadModel", "pp=4", {"layers": 4}),
    "GPT-Neo": Family("GPTNeoForCausalLM"),
    "GPT-J": Family("GPTJForCausalLM", TP_DP),
    "GPT-NeoX": Family("GPTNeoXForCausalLM"),
    "GPT-BigCode": Family("GPTBigCodeForCausalLM"),
    "CodeGen": Family("CodeGenForCausalLM", PP_DP),
    "StarCoder2": Family("Starcoder2ForCausalLM"),
    "Falcon": Family("FalconForCausalLM", "tp=4", {"new_decoder_architecture": True}),
    "Falcon, one key head": Family("FalconForCausalLM", TP_PP),
    "BLOOM": Family("BloomForCausalLM"),
    "OPT": Family("OPTForCausalLM", TP_DP),
    "MPT": Family("MptForCausalLM"),
    "XGLM": Family("XGLMForCausalLM", TP_DP),
    "BioGPT": Family("BioGptForCausalLM", PP_DP),
    "StableLM": Family("StableLmForCausalLM"),
    "Persimmon": Family("PersimmonForCausalLM", "tp=4"),
    "Cohere": Family("CohereForCausalLM"),
    "Cohere 2": Family("Cohere2ForCausalLM", TP_DP),
    "OLMo": Family("OlmoForCausalLM"),
    "OLMo 2": Family("Olmo2ForCausalLM", "tp=4"),
    "OLMoE": Family("OlmoeForCausalLM"),
    "SmolLM3, 8 layers": Family(
        "SmolLM3ForCausalLM",
        CHUNKS,
        {"layers": 8, "no_rope_layers": [1, 1, 1, 0] * 2},
    ),
    "Granite": Family("GraniteForCausalLM"),
    "Granite-MoE": Family("GraniteMoeForCausalLM", TP_DP),
    "Nemotron": Family("NemotronForCausalLM"),
    "GLM": Family("GlmForCausalLM"),
    "GLM-4": Family("Glm4ForCausalLM", TP_DP),
    "Helium": Family("HeliumForCausalLM"),
    "EXAONE 4": Family("Exaone4ForCausalLM", TP_DP),
    "Seed-OSS": Family("SeedOssForCausalLM", "tp=4"),
    "ERNIE 4.5": Family("Ernie4_5ForCausalLM"),
    "Mamba": Family("MambaForCausalLM"),
    "Mamba 2": Family("Mamba2ForCausalLM", TP_DP),
    "Falcon-Mamba": Family("FalconMambaForCausalLM", PP_DP),
    "RWKV-4": Family("RwkvForCausalLM", PP_DP),
    "GPT-OSS": Family("GptOssForCausalLM"),
    "OLMo 3": Family("Olmo3ForCausalLM", TP_DP),
    "LFM2": Family("Lfm2ForCausalLM"),
    "DBRX": Family("DbrxForCausalLM", TP_DP, refusal=BY_ROW),
    "MiniMax": Family("MiniMaxForCausalLM", TP_DP),
    "Gemma 3n": Family("Gemma3nForCausalLM", TP_DP, refusal="it writes to its weights in forward"),
    "Zamba 2": Family("Zamba2ForCausalLM", PP_DP),
    "Jamba": Family("JambaForCausalLM", small={"use_cache": False}),
    "RecurrentGemma": Family("RecurrentGemmaForCausalLM", TP_DP, {"use_cache": False}),
}

FAMILIES = {name: family.outside() for name, family in _FAMILIES.items()}

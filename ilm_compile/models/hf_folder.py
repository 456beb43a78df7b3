"""The causal language model of a Hugging Face folder: its architecture, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.models.registry import MODEL_INITIALIZER

HF = "HF"


@MODEL_INITIALIZER.register_module(HF)
def hf_causal_lm(*, hf: str) -> nn.Module:
    """The model that config.json in the folder `hf` describes, its parameters in float32.

    Nothing is downloaded and no code of the folder is run. Raises `IlmCompileError` if transformers
    is missing or knows no such model.
    """
    folder = Path(hf)
    if not (folder / "config.json").is_file():
        raise IlmCompileError(
            f"model.hf: expected the folder of a Hugging Face model, with a config.json, got {hf}"
        )
    auto_config, auto_model = _transformers()
    try:
        config = auto_config.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantized, which cannot be trained")
        config.use_cache = False
        model: nn.Module = auto_model.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # whatever a config.json can make transformers raise
        raise IlmCompileError(
            f"model.hf: transformers cannot build a causal language model from {folder}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return model


def _transformers() -> tuple[Any, Any]:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise IlmCompileError(
            "model.hf needs transformers: pip install 'ilm_compile[hf]'"
        ) from error
    return AutoConfig, AutoModelForCausalLM

"""Ordinary single-device InternLM and InternLM2. Nothing in here knows of parallelism."""

from ilm_compile.models.config import InternLM2Config as InternLM2Config
from ilm_compile.models.config import InternLMConfig as InternLMConfig
from ilm_compile.models.config import ModelConfig as ModelConfig
from ilm_compile.models.decoder import Decoder as Decoder
from ilm_compile.models.decoder_config import DECODERS as DECODERS
from ilm_compile.models.decoder_config import DecoderConfig as DecoderConfig
from ilm_compile.models.hf import from_hf_internlm2_state_dict as from_hf_internlm2_state_dict
from ilm_compile.models.hf import from_hf_llama_state_dict as from_hf_llama_state_dict
from ilm_compile.models.hf import to_hf_internlm2_state_dict as to_hf_internlm2_state_dict
from ilm_compile.models.hf import to_hf_llama_state_dict as to_hf_llama_state_dict
from ilm_compile.models.hf_folder import HF as HF
from ilm_compile.models.hf_folder import hf_causal_lm as hf_causal_lm
from ilm_compile.models.init import initialize_ as initialize_
from ilm_compile.models.internlm import InternLM as InternLM
from ilm_compile.models.internlm2 import InternLM2 as InternLM2
from ilm_compile.models.presets import internlm2_1_8b as internlm2_1_8b
from ilm_compile.models.presets import internlm2_7b as internlm2_7b
from ilm_compile.models.presets import internlm2_20b as internlm2_20b
from ilm_compile.models.presets import internlm2_tiny as internlm2_tiny
from ilm_compile.models.presets import internlm_7b as internlm_7b
from ilm_compile.models.presets import internlm_20b as internlm_20b
from ilm_compile.models.presets import internlm_tiny as internlm_tiny
from ilm_compile.models.registry import MODEL_INITIALIZER as MODEL_INITIALIZER
from ilm_compile.models.registry import Registry as Registry
from ilm_compile.models.registry import initialize_model as initialize_model

"""The published sizes, and two tiny ones for tests. Every preset takes overrides of config fields.

Sizes: InternEvo's configs/7B_sft.py and configs/_base_/models/. Build the large ones under
`torch.device("meta")` unless the memory is there.
"""

from typing import Any

from ilm_compile.models.internlm import InternLM, build_internlm
from ilm_compile.models.internlm2 import InternLM2, build_internlm2

_INTERNLM: dict[str, Any] = {"vocab_size": 103168, "mlp_ratio": 8 / 3}
_INTERNLM2: dict[str, Any] = {
    "vocab_size": 92544,
    "num_kv_attention_heads": 8,
    "max_seq_len": 4096,
}
_TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "vocab_size": 512,
    "num_attention_heads": 8,
    "max_seq_len": 64,
}


def internlm_7b(**overrides: Any) -> InternLM:
    size = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32}
    return build_internlm(**{**_INTERNLM, **size, **overrides})


def internlm_20b(**overrides: Any) -> InternLM:
    size = {"num_layers": 60, "hidden_size": 5120, "num_attention_heads": 40}
    return build_internlm(**{**_INTERNLM, **size, **overrides})


def internlm_tiny(**overrides: Any) -> InternLM:
    """4 blocks, 8 heads, hidden size 64."""
    return build_internlm(**{**_TINY, **overrides})


def internlm2_1_8b(**overrides: Any) -> InternLM2:
    size = {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "mlp_ratio": 4.0}
    return build_internlm2(**{**_INTERNLM2, **size, "norm_head": True, **overrides})


def internlm2_7b(**overrides: Any) -> InternLM2:
    size = {"num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "mlp_ratio": 3.5}
    return build_internlm2(**{**_INTERNLM2, **size, "adapt_hf": False, **overrides})


def internlm2_20b(**overrides: Any) -> InternLM2:
    size = {"num_layers": 48, "hidden_size": 6144, "num_attention_heads": 48, "mlp_ratio": 8 / 3}
    return build_internlm2(**{**_INTERNLM2, **size, **overrides})


def internlm2_tiny(**overrides: Any) -> InternLM2:
    """4 blocks, 8 query heads, 4 key heads, hidden size 64."""
    return build_internlm2(**{**_TINY, "num_kv_attention_heads": 4, "mlp_ratio": 3.5, **overrides})

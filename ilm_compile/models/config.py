"""What a model is made of: one frozen dataclass per family, with the keys of InternEvo's configs.

A config that exists is valid: `__post_init__` refuses the rest. Sizes only; nothing here knows of
devices, dtypes or parallelism.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar

from ilm_compile.errors import IlmCompileError

_POSITIVE = (
    *("num_layers", "hidden_size", "vocab_size", "num_attention_heads", "max_seq_len"),
    *("mlp_ratio", "multiple_of", "layer_norm_epsilon", "rope_base"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """What InternLM and InternLM2 share.

    embed_grad_scale: the part of the gradient that reaches the embedding and the head (1: all).
    multiple_of: the width inside an MLP is rounded up to a multiple of it.
    norm_type: "layernorm" has a bias and takes the mean away first.
    norm_fp32: norms of a bf16 or fp16 model are computed in float32.
    *_init_std: standard deviation of the initial weights of each kind; init_type: how they spread.
    max_seq_len: only the default length of `example_inputs`; the models take any length.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    mlp_ratio: float
    multiple_of: int = 256
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    layer_norm_epsilon: float = 1e-5
    rope_base: float = 10000.0
    embed_grad_scale: float = 1.0
    norm_fp32: bool = True
    max_seq_len: int = 2048
    seed: int = 1024
    init_type: Literal["normal", "uniform"] = "normal"
    embedding_init_std: float
    attn_wqkv_init_std: float
    attn_other_init_std: float
    ffn_uplayer_init_std: float
    ffn_other_init_std: float
    out_head_init_std: float

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            require(self, getattr(self, name) > 0, f"{name} must be positive")
        for field in fields(self):
            if field.name.endswith("_init_std"):
                require(self, getattr(self, field.name) >= 0, f"{field.name} must not be negative")
        require(
            self,
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size={self.hidden_size} must be a multiple of "
            f"num_attention_heads={self.num_attention_heads}",
        )
        require(
            self,
            self.head_dim % 2 == 0,
            f"hidden_size / num_attention_heads = {self.head_dim} must be even: rotary positions "
            "turn pairs of numbers",
        )
        require(
            self,
            0 <= self.embed_grad_scale <= 1,
            f"embed_grad_scale={self.embed_grad_scale} must lie in [0, 1]",
        )
        require(
            self,
            self.norm_type in ("rmsnorm", "layernorm"),
            f"norm_type={self.norm_type!r} must be 'rmsnorm' or 'layernorm'",
        )
        require(
            self,
            self.init_type in ("normal", "uniform"),
            f"init_type={self.init_type!r} must be 'normal' or 'uniform'",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_hidden_size(self) -> int:
        """Width inside the MLP: int(hidden * ratio), rounded up to a multiple of `multiple_of`."""
        return -(-int(self.hidden_size * self.mlp_ratio) // self.multiple_of) * self.multiple_of


@dataclass(frozen=True, kw_only=True, slots=True)
class InternLMConfig(ModelConfig):
    """InternLM (v1): every query head has its own key head, attention has biases."""

    mlp_ratio: float = 8 / 3
    embedding_init_std: float = 0.0052
    attn_wqkv_init_std: float = 0.006
    attn_other_init_std: float = 0.006
    ffn_uplayer_init_std: float = 0.006
    ffn_other_init_std: float = 0.006
    out_head_init_std: float = 0.0052

    @property
    def num_kv_attention_heads(self) -> int:
        return self.num_attention_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class InternLM2Config(ModelConfig):
    """InternLM2: grouped key heads, no biases unless asked.

    adapt_hf: False where the rows of each query and key head alternate even and odd rotary
    numbers, as Meta's LLaMA stores them, instead of holding one half after the other.
    norm_head: rows of the output matrix are scaled to length 1 before use (arXiv:2309.10305).
    apply_post_layer_norm: norms after each residual sum, and none before the head.
    """

    num_kv_attention_heads: int
    mlp_ratio: float = 4.0
    rope_base: float = 1000000.0
    no_bias: bool = True
    adapt_hf: bool = True
    norm_head: bool = False
    apply_post_layer_norm: bool = False
    embedding_init_std: float = 0.02
    attn_wqkv_init_std: float = 0.02
    attn_other_init_std: float = 0.02
    ffn_uplayer_init_std: float = 0.02
    ffn_other_init_std: float = 0.02
    out_head_init_std: float = 0.02

    def __post_init__(self) -> None:
        # super() without arguments does not work in a dataclass with slots.
        ModelConfig.__post_init__(self)
        require_key_heads(self, self.num_kv_attention_heads)

    @property
    def qkv_bias(self) -> bool:
        return not self.no_bias

    @property
    def o_bias(self) -> bool:
        return not self.no_bias

    @property
    def qk_norm(self) -> bool:
        return False


def require_key_heads(config: ModelConfig, kv_heads: int) -> None:
    """Refuse a number of key heads that the query heads cannot share."""
    require(config, kv_heads > 0, "num_kv_attention_heads must be positive")
    require(
        config,
        config.num_attention_heads % kv_heads == 0,
        f"num_attention_heads={config.num_attention_heads} must be a multiple of "
        f"num_kv_attention_heads={kv_heads}",
    )


def require(config: ModelConfig, condition: bool, message: str) -> None:
    """Raise `IlmCompileError` with the message and the config unless the condition holds."""
    if not condition:
        raise IlmCompileError(f"{type(config).__name__}: {message}; got {config}")


ConfigT = TypeVar("ConfigT", bound=ModelConfig)


def config_from_fields(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """A config from a plain mapping. Refuses a key it does not know, and a required one missing."""
    known = {field.name: field for field in fields(config_class)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise IlmCompileError(
            f"{config_class.__name__}: unknown field {', '.join(unknown)}; "
            f"known fields: {', '.join(known)}"
        )
    missing = [n for n, field in known.items() if field.default is MISSING and n not in values]
    if missing:
        raise IlmCompileError(f"{config_class.__name__}: missing field {', '.join(missing)}")
    return config_class(**values)

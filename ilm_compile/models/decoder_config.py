"""What the other models of InternEvo are made of: one config, and what differs by `model_type`.

The defaults of each type are those of InternEvo's builder of that name.
"""

from dataclasses import dataclass
from typing import Literal

from ilm_compile.models.config import ModelConfig, require, require_key_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig(ModelConfig):
    """Grouped-query attention with options, and experts in place of the MLP.

    head_dim: 0 for hidden_size / num_attention_heads.
    qkv_bias, o_bias: biases of attention's products, before and after.
    qk_norm: query and key heads are normalised before they are turned.
    adapt_hf, norm_head: as those of InternLM2.
    num_experts: 1 for an ordinary MLP. top_k: experts of a token.
    num_shared_experts: how many times as wide as an expert the one is that every token has.
    shared_gate: how that one is weighed, see `ilm_compile.models.experts`.
    capacity_factor: an expert takes ceil(tokens / num_experts * top_k * factor) choices of a
    micro-batch, at least min_capacity, and no others; 0: all of them.
    normalize_experts: the weights of a token's experts add up to 1.
    balance: which choices the routers' loss counts, see `balance_loss`; moe_loss_coeff: its part.
    """

    num_kv_attention_heads: int
    head_dim: int = 0
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    o_bias: bool = False
    qk_norm: bool = False
    adapt_hf: bool = True
    norm_head: bool = False
    num_experts: int = 1
    top_k: int = 1
    num_shared_experts: int = 0
    shared_gate: Literal["softmax", "sigmoid"] = "sigmoid"
    capacity_factor: float = 1.0
    min_capacity: int = 4
    normalize_experts: bool = True
    balance: Literal["first", "all", "layers"] = "first"
    moe_loss_coeff: float = 1.0
    embedding_init_std: float = 0.02
    attn_wqkv_init_std: float = 0.02
    attn_other_init_std: float = 0.02
    ffn_uplayer_init_std: float = 0.02
    ffn_other_init_std: float = 0.02
    out_head_init_std: float = 0.02
    router_init_std: float = 0.02

    def __post_init__(self) -> None:
        if not self.head_dim and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        ModelConfig.__post_init__(self)
        require_key_heads(self, self.num_kv_attention_heads)
        for is_right, message in (
            (self.num_experts > 0, "num_experts must be positive; 1 is an MLP"),
            (
                0 < self.top_k <= self.num_experts,
                f"top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}",
            ),
            (
                self.num_experts > 1 or not self.num_shared_experts,
                "num_shared_experts needs num_experts above 1",
            ),
            (self.num_shared_experts >= 0, "num_shared_experts must not be negative"),
            (self.capacity_factor >= 0, "capacity_factor must not be negative"),
            (self.min_capacity >= 0, "min_capacity must not be negative"),
            (
                self.shared_gate in ("softmax", "sigmoid"),
                f"shared_gate={self.shared_gate!r} must be 'softmax' or 'sigmoid'",
            ),
            (
                self.balance in ("first", "all", "layers"),
                f"balance={self.balance!r} must be 'first', 'all' or 'layers'",
            ),
        ):
            require(self, is_right, message)

    @property
    def shared_hidden_size(self) -> int:
        """Width of the expert that every token has, rounded up as that of the others."""
        width = int(self.hidden_size * self.mlp_ratio) * self.num_shared_experts
        return -(-width // self.multiple_of) * self.multiple_of


@dataclass(frozen=True, kw_only=True, slots=True)
class _SmallStart(DecoderConfig):
    """The initial weights of InternLM."""

    shared_gate: Literal["softmax", "sigmoid"] = "softmax"
    embedding_init_std: float = 0.0052
    attn_wqkv_init_std: float = 0.006
    attn_other_init_std: float = 0.006
    ffn_uplayer_init_std: float = 0.006
    ffn_other_init_std: float = 0.006
    out_head_init_std: float = 0.0052
    router_init_std: float = 0.0015


@dataclass(frozen=True, kw_only=True, slots=True)
class InternLMMoEConfig(_SmallStart):
    """INTERNLM_MoE: InternLM (v1) with experts."""

    o_bias: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtralConfig(_SmallStart):
    """MIXTRALMOE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenConfig(DecoderConfig):
    """QWEN2 and QWEN2MOE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Qwen3MoEConfig(DecoderConfig):
    """QWEN3MOE: normalised query and key heads, experts that take every token."""

    qk_norm: bool = True
    capacity_factor: float = 0.0
    balance: Literal["first", "all", "layers"] = "layers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Baichuan2Config(DecoderConfig):
    """BAICHUAN2: no experts."""

    embedding_init_std: float = 0.0052
    attn_wqkv_init_std: float = 0.006
    attn_other_init_std: float = 0.0015
    ffn_uplayer_init_std: float = 0.006
    ffn_other_init_std: float = 0.0015
    out_head_init_std: float = 0.0052


DECODERS: dict[str, type[DecoderConfig]] = {
    "INTERNLM_MoE": InternLMMoEConfig,
    "MIXTRALMOE": MixtralConfig,
    "QWEN2MOE": QwenConfig,
    "QWEN3MOE": Qwen3MoEConfig,
    "QWEN2": QwenConfig,
    "BAICHUAN2": Baichuan2Config,
}

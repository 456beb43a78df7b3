"""The other models of InternEvo on one device: its mixtures of experts, QWEN2 and BAICHUAN2.

They are decoders as InternLM2 is one, with biases, head sizes and norms that a config decides, and
an MLP or a mixture of experts in each block. Names of parameters follow InternLM2's.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from ilm_compile.models.blocks import MLP, OutputHead, scale_gradient, token_loss
from ilm_compile.models.causal_lm import CausalLM
from ilm_compile.models.config import config_from_fields
from ilm_compile.models.decoder_config import DECODERS, DecoderConfig
from ilm_compile.models.experts import MixtureOfExperts, balance_loss
from ilm_compile.models.init import Constant, InitTable, Random
from ilm_compile.models.internlm2 import Attention, InternLM2
from ilm_compile.models.norm import make_norm
from ilm_compile.models.registry import MODEL_INITIALIZER
from ilm_compile.models.rotary import default_positions, rotary_tables


class Block(nn.Module):
    """x + attention(norm(x)), then that plus its experts; the router's balance beside it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config)
        self.has_experts = config.num_experts > 1
        self.feed_forward = (
            MixtureOfExperts(config)
            if self.has_experts
            else MLP(config.hidden_size, config.ffn_hidden_size)
        )

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x = x + self.attention(self.attention_norm(x), cos, sin, cu_seqlens)
        found = self.feed_forward(self.ffn_norm(x))
        out, balance = found if self.has_experts else (found, None)
        return x + out, balance


class Decoder(CausalLM):
    """Grouped key heads, rotary positions, a norm before each part, SwiGLU, maybe by experts."""

    config: DecoderConfig
    init_table: ClassVar[InitTable] = {
        **InternLM2.init_table,
        "layers.attention.q_norm.weight": Constant(1.0),
        "layers.attention.k_norm.weight": Constant(1.0),
        "layers.feed_forward.gate.wg.weight": Random("router_init_std"),
        "layers.feed_forward.experts.w1": Random("ffn_uplayer_init_std"),
        "layers.feed_forward.experts.w3": Random("ffn_uplayer_init_std"),
        "layers.feed_forward.experts.w2": Random("ffn_other_init_std", depth_scaled=True),
        "layers.feed_forward.residual_mlp.w1.weight": Random("ffn_uplayer_init_std"),
        "layers.feed_forward.residual_mlp.w3.weight": Random("ffn_uplayer_init_std"),
        "layers.feed_forward.residual_mlp.w2.weight": Random(
            "ffn_other_init_std", depth_scaled=True
        ),
        "layers.feed_forward.coefficient.weight": Random("router_init_std"),
        "layers.feed_forward.coefficient.bias": Constant(0.0),
    }

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.output = OutputHead(
            config.hidden_size,
            config.vocab_size,
            grad_scale=config.embed_grad_scale,
            unit_rows=config.norm_head,
        )
        self._fill_unless_meta()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, S, vocab), or when labels are given the mean loss, the routers' included.

        The arguments are those of `InternLM2`. The routers' loss is of the tokens of this call,
        ignored labels or not, times moe_loss_coeff.
        """
        config = self.config
        if position_ids is None:
            position_ids = default_positions(input_ids, cu_seqlens)
        x = scale_gradient(self.tok_embeddings(input_ids), config.embed_grad_scale)
        cos, sin = rotary_tables(
            position_ids, head_dim=config.head_dim, base=config.rope_base, dtype=x.dtype
        )
        total: Tensor | None = None
        for block in self.layers:
            x, balance = block(x, cos, sin, cu_seqlens)
            total = balance if total is None else total + balance
        logits: Tensor = self.output(self.norm(x))
        if labels is None:
            return logits
        loss = token_loss(logits, labels)
        if total is None:
            return loss
        return loss + config.moe_loss_coeff * balance_loss(config, total, config.num_layers)


def _register(name: str, family: type[DecoderConfig]) -> None:
    @MODEL_INITIALIZER.register_module(module_name=name)
    def build(**fields: Any) -> Decoder:
        """A Decoder from the fields of its config."""
        return Decoder(config_from_fields(family, fields))


for _name, _family in DECODERS.items():
    _register(_name, _family)

"""InternLM (v1), the model that InternEvo calls INTERNLM, on one device.

Shapes in this file: x (B batch, S seq, hidden); q, k, v (B, S, heads, head_dim). Parameter names
follow InternEvo since v0.3: w2 is the down projection and w3 the up projection.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from ilm_compile.kernels.attention import attention
from ilm_compile.models.blocks import MLP, OutputHead, scale_gradient, token_loss
from ilm_compile.models.causal_lm import CausalLM
from ilm_compile.models.config import InternLMConfig, config_from_fields
from ilm_compile.models.init import Constant, InitTable, Random
from ilm_compile.models.norm import make_norm
from ilm_compile.models.registry import MODEL_INITIALIZER
from ilm_compile.models.rotary import default_positions, rotary_tables, rotate


class Mixer(nn.Module):
    """Attention. The rows of Wqkv are all query heads, then all key heads, then all value heads."""

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__()
        self.config = config
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        batch, seq, _ = x.shape
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        q, k, v = self.Wqkv(x).view(batch, seq, 3, heads, head_dim).unbind(2)
        context = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, cu_seqlens)
        out: Tensor = self.out_proj(context.flatten(2))
        return out


class Block(nn.Module):
    """x + mixer(norm1(x)), then that plus mlp(norm2(that))."""

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config)
        self.mixer = Mixer(config)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config.hidden_size, config.ffn_hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        x = x + self.mixer(self.norm1(x), cos, sin, cu_seqlens)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class InternLM(CausalLM):
    """InternLM (v1): rotary positions, RMSNorm before each part, SwiGLU, biases in attention."""

    config: InternLMConfig
    init_table: ClassVar[InitTable] = {
        "embedding.weight": Random("embedding_init_std"),
        "blocks.norm1.weight": Constant(1.0),
        "blocks.norm1.bias": Constant(0.0),
        "blocks.mixer.Wqkv.weight": Random("attn_wqkv_init_std"),
        "blocks.mixer.Wqkv.bias": Constant(0.0),
        "blocks.mixer.out_proj.weight": Random("attn_other_init_std", depth_scaled=True),
        "blocks.mixer.out_proj.bias": Constant(0.0),
        "blocks.norm2.weight": Constant(1.0),
        "blocks.norm2.bias": Constant(0.0),
        "blocks.mlp.w1.weight": Random("ffn_uplayer_init_std"),
        "blocks.mlp.w3.weight": Random("ffn_uplayer_init_std"),
        "blocks.mlp.w2.weight": Random("ffn_other_init_std", depth_scaled=True),
        "norm.weight": Constant(1.0),
        "norm.bias": Constant(0.0),
        "head.weight": Random("out_head_init_std"),
    }

    def __init__(self, config: InternLMConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = make_norm(config)
        self.head = OutputHead(
            config.hidden_size, config.vocab_size, grad_scale=config.embed_grad_scale
        )
        self._fill_unless_meta()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, S, vocab), or the mean loss when labels are given.

        input_ids, labels: (B, S), labels[:, t] the target of position t, -100 to ignore it.
        position_ids: (B or 1, S), counted from the start of each document when None.
        cu_seqlens: document boundaries as `ilm_compile.kernels.attention` takes them.
        """
        if position_ids is None:
            position_ids = default_positions(input_ids, cu_seqlens)
        x = scale_gradient(self.embedding(input_ids), self.config.embed_grad_scale)
        cos, sin = rotary_tables(
            position_ids,
            head_dim=self.config.head_dim,
            base=self.config.rope_base,
            dtype=x.dtype,
        )
        for block in self.blocks:
            x = block(x, cos, sin, cu_seqlens)
        logits: Tensor = self.head(self.norm(x))
        return logits if labels is None else token_loss(logits, labels)


@MODEL_INITIALIZER.register_module(module_name="INTERNLM")
def build_internlm(**fields: Any) -> InternLM:
    """An InternLM from the fields of `InternLMConfig`."""
    return InternLM(config_from_fields(InternLMConfig, fields))

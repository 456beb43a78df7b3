"""InternLM2, the model that InternEvo calls INTERNLM2_PUBLIC, on one device.

Shapes in this file: x (B batch, S seq, hidden); q (B, S, heads, head_dim); k, v (B, S, kv_heads,
head_dim).
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from ilm_compile.kernels.attention import attention
from ilm_compile.models.blocks import MLP, OutputHead, scale_gradient, token_loss
from ilm_compile.models.causal_lm import CausalLM
from ilm_compile.models.config import InternLM2Config, config_from_fields
from ilm_compile.models.decoder_config import DecoderConfig
from ilm_compile.models.init import Constant, InitTable, Random
from ilm_compile.models.norm import make_norm
from ilm_compile.models.registry import MODEL_INITIALIZER
from ilm_compile.models.rotary import default_positions, even_then_odd, rotary_tables, rotate


class Attention(nn.Module):
    """Grouped-query attention.

    The rows of wqkv come in groups, one for each key head: the query heads that read it, then the
    key head, then the value head.
    """

    def __init__(self, config: InternLM2Config | DecoderConfig) -> None:
        super().__init__()
        self.config = config
        heads, kv_heads, size = (
            config.num_attention_heads,
            config.num_kv_attention_heads,
            config.head_dim,
        )
        self.wqkv = nn.Linear(
            config.hidden_size, (heads + 2 * kv_heads) * size, bias=config.qkv_bias
        )
        self.wo = nn.Linear(heads * size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = make_norm(config, size)
            self.k_norm = make_norm(config, size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        batch, seq, _ = x.shape
        heads, head_dim = self.config.num_attention_heads, self.config.head_dim
        kv_heads = self.config.num_kv_attention_heads
        q_per_kv = heads // kv_heads
        qkv = self.wqkv(x).view(batch, seq, kv_heads, q_per_kv + 2, head_dim)
        q = qkv[:, :, :, :q_per_kv].reshape(batch, seq, heads, head_dim)
        k, v = qkv[:, :, :, -2], qkv[:, :, :, -1]
        if not self.config.adapt_hf:
            q, k = even_then_odd(q), even_then_odd(k)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        context = attention(rotate(q, cos, sin), rotate(k, cos, sin), v, cu_seqlens)
        out: Tensor = self.wo(context.flatten(2))
        return out


class Block(nn.Module):
    """Attention and MLP, each added to its input.

    Norms stand before each part. With apply_post_layer_norm they stand after each sum instead:
    x = attention_norm(x + attention(x)), then ffn_norm(x + feed_forward(x)), as in InternEvo's
    internlm/model/modeling_internlm2.py.
    """

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.post_norm = config.apply_post_layer_norm
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config)
        self.feed_forward = MLP(config.hidden_size, config.ffn_hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        out: Tensor
        if self.post_norm:
            x = self.attention_norm(x + self.attention(x, cos, sin, cu_seqlens))
            out = self.ffn_norm(x + self.feed_forward(x))
        else:
            x = x + self.attention(self.attention_norm(x), cos, sin, cu_seqlens)
            out = x + self.feed_forward(self.ffn_norm(x))
        return out


class InternLM2(CausalLM):
    """InternLM2: grouped key heads, rotary positions, RMSNorm, SwiGLU.

    With apply_post_layer_norm there is no `norm` before the output: the last block ends in one.
    """

    config: InternLM2Config
    init_table: ClassVar[InitTable] = {
        "tok_embeddings.weight": Random("embedding_init_std"),
        "layers.attention_norm.weight": Constant(1.0),
        "layers.attention_norm.bias": Constant(0.0),
        "layers.attention.wqkv.weight": Random("attn_wqkv_init_std"),
        "layers.attention.wqkv.bias": Constant(0.0),
        "layers.attention.wo.weight": Random("attn_other_init_std", depth_scaled=True),
        "layers.attention.wo.bias": Constant(0.0),
        "layers.ffn_norm.weight": Constant(1.0),
        "layers.ffn_norm.bias": Constant(0.0),
        "layers.feed_forward.w1.weight": Random("ffn_uplayer_init_std"),
        "layers.feed_forward.w3.weight": Random("ffn_uplayer_init_std"),
        "layers.feed_forward.w2.weight": Random("ffn_other_init_std", depth_scaled=True),
        "norm.weight": Constant(1.0),
        "norm.bias": Constant(0.0),
        "output.weight": Random("out_head_init_std"),
    }

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if not config.apply_post_layer_norm:
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
        """Logits (B, S, vocab), or the mean loss when labels are given.

        input_ids, labels: (B, S), labels[:, t] the target of position t, -100 to ignore it.
        position_ids: (B or 1, S), counted from the start of each document when None.
        cu_seqlens: document boundaries as `ilm_compile.kernels.attention` takes them.
        """
        if position_ids is None:
            position_ids = default_positions(input_ids, cu_seqlens)
        x = scale_gradient(self.tok_embeddings(input_ids), self.config.embed_grad_scale)
        cos, sin = rotary_tables(
            position_ids,
            head_dim=self.config.head_dim,
            base=self.config.rope_base,
            dtype=x.dtype,
        )
        for block in self.layers:
            x = block(x, cos, sin, cu_seqlens)
        if not self.config.apply_post_layer_norm:
            x = self.norm(x)
        logits: Tensor = self.output(x)
        return logits if labels is None else token_loss(logits, labels)


@MODEL_INITIALIZER.register_module(module_name="INTERNLM2")
@MODEL_INITIALIZER.register_module(module_name="INTERNLM2_PUBLIC")
@MODEL_INITIALIZER.register_module(module_name="INTERNLM3")
@MODEL_INITIALIZER.register_module(module_name="LLAMA")
@MODEL_INITIALIZER.register_module(module_name="LLAMA2")
def build_internlm2(**fields: Any) -> InternLM2:
    """An InternLM2 from the fields of `InternLM2Config`.

    InternEvo's LLAMA and INTERNLM3 compute the same; they keep q, k and v in matrices of their own.
    """
    return InternLM2(config_from_fields(InternLM2Config, fields))

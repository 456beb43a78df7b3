"""Like nGPT: weights, queries and states on the unit sphere, mixed by learned rates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import HEADS, HIDDEN, LAYERS, VOCAB
from tests.support.outside.llama2c import apply_rotary_emb, precompute_freqs_cis

HEAD_DIM = HIDDEN // HEADS


def justnorm(x: Tensor, dim: int = -1) -> Tensor:
    return x / x.norm(p=2, dim=dim, keepdim=True)


class NormLinear(nn.Module):
    """A linear map whose weight has rows, or columns, of length one."""

    def __init__(self, dim: int, out: int, norm_dim: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, dim))
        self.norm_dim = norm_dim

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, justnorm(self.weight, self.norm_dim))


class Scale(nn.Module):
    def __init__(self, dim: int, init: float, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), scale))
        self.forward_scale = init / scale

    def forward(self) -> Tensor:
        return self.scale * self.forward_scale


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (NormLinear(HIDDEN, HIDDEN) for _ in range(3))
        self.att_c_proj = NormLinear(HIDDEN, HIDDEN, norm_dim=0)
        self.c_fc = NormLinear(HIDDEN, 4 * HIDDEN)
        self.mlp_c_proj = NormLinear(2 * HIDDEN, HIDDEN, norm_dim=0)
        self.sqk = Scale(HIDDEN, 1.0, HIDDEN**-0.5)
        self.suv = Scale(4 * HIDDEN, 1.0, 1.0)
        self.attn_alpha, self.mlp_alpha = (Scale(HIDDEN, 0.05, HIDDEN**-0.5) for _ in range(2))

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, seq, width = h.shape
        shape = (rows, seq, HEADS, HEAD_DIM)
        q, k, v = (proj(h).view(shape) for proj in (self.query, self.key, self.value))
        q, k = apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin)
        sqk = self.sqk().view(1, 1, HEADS, HEAD_DIM)
        q, k = sqk * justnorm(q), sqk * justnorm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=HEAD_DIM**0.5)
        y = self.att_c_proj(y.transpose(1, 2).reshape(rows, seq, width))
        h = justnorm(h + self.attn_alpha().abs() * (justnorm(y) - justnorm(h)))
        u, v = torch.chunk(self.suv() * self.c_fc(h), 2, dim=-1)
        y = self.mlp_c_proj(u * F.silu(v))
        return justnorm(h + self.mlp_alpha().abs() * (justnorm(y) - justnorm(h)))


class NGPT(nn.Module):
    """forward(x) returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, HIDDEN)
        self.h = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.lm_head = NormLinear(HIDDEN, VOCAB)
        self.sz = Scale(VOCAB, 1.0, HIDDEN**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = (t.to(x.device) for t in precompute_freqs_cis(HEAD_DIM, x.shape[1]))
        h = justnorm(self.wte(x))
        for block in self.h:
            h = block(h, cos, sin)
        return self.sz() * self.lm_head(h)

"""Like PaLM-pytorch: parallel blocks, one fused projection, one key head, a gamma-beta norm."""

from __future__ import annotations

import torch
from torch import Tensor, einsum, nn
from torch.nn import functional as F

from tests.support.outside import HEADS, HIDDEN, LAYERS, VOCAB

DIM_HEAD = 8


class LayerNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class RotaryEmbedding(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim)))

    def forward(self, max_seq_len: int, *, device: torch.device) -> Tensor:
        seq = torch.arange(max_seq_len, device=device, dtype=self.inv_freq.dtype)
        freqs = einsum("i , j -> i j", seq, self.inv_freq)
        return torch.cat((freqs, freqs), dim=-1)


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x.reshape(*x.shape[:-1], 2, -1).unbind(dim=-2)
    return torch.cat((-x2, x1), dim=-1)


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class ParallelTransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm(HIDDEN)
        self.fused_dims = (HEADS * DIM_HEAD, DIM_HEAD, DIM_HEAD, 8 * HIDDEN)
        self.rotary_emb = RotaryEmbedding(DIM_HEAD)
        self.fused_attn_ff_proj = nn.Linear(HIDDEN, sum(self.fused_dims), bias=False)
        self.attn_out = nn.Linear(HEADS * DIM_HEAD, HIDDEN, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(4 * HIDDEN, HIDDEN, bias=False))
        self.register_buffer("mask", None, persistent=False)
        self.register_buffer("pos_emb", None, persistent=False)

    def get_mask(self, n: int, device: torch.device) -> Tensor:
        if self.mask is not None and self.mask.shape[-1] >= n:
            return self.mask[:n, :n]
        mask = torch.ones((n, n), device=device, dtype=torch.bool).triu(1)
        self.register_buffer("mask", mask, persistent=False)
        return mask

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.fused_dims, dim=-1)
        q = q.unflatten(-1, (HEADS, DIM_HEAD)).transpose(1, 2)
        positions = self.rotary_emb(n, device=x.device)
        q = q * positions.cos() + rotate_half(q) * positions.sin()
        k = k * positions.cos() + rotate_half(k) * positions.sin()
        sim = einsum("b h i d, b j d -> b h i j", q * DIM_HEAD**-0.5, k)
        sim = sim.masked_fill(self.get_mask(n, x.device), -torch.finfo(sim.dtype).max)
        sim = sim - sim.amax(dim=-1, keepdim=True).detach()
        out = einsum("b h i j, b j d -> b h i d", sim.softmax(dim=-1), v)
        return self.attn_out(out.transpose(1, 2).flatten(2)) + self.ff_out(ff)


class PaLM(nn.Sequential):
    """forward(ids) returns logits; head and embedding are tied."""

    def __init__(self) -> None:
        super().__init__(
            nn.Embedding(VOCAB, HIDDEN),
            *[Residual(ParallelTransformerBlock()) for _ in range(LAYERS)],
            LayerNorm(HIDDEN),
            nn.Linear(HIDDEN, VOCAB, bias=False),
        )
        self[-1].weight = self[0].weight
        nn.init.normal_(self[0].weight, std=0.02)

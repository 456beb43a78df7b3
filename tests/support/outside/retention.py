"""Attention without a softmax: RetNet's retention, and linear attention by cumulative sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import HEADS, HIDDEN, LAYERS, VOCAB

HEAD_DIM = HIDDEN // HEADS


class Retention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gammas = (1 - torch.exp2(-torch.linspace(5, 8, HEADS))).tolist()
        self.W_Q, self.W_K, self.W_V, self.W_G, self.W_O = (
            nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(5)
        )
        self.group_norm = nn.GroupNorm(HEADS, HIDDEN)

    def decay(self, seq: int, x: Tensor) -> Tensor:
        n = torch.arange(seq, device=x.device)
        distance = (n[:, None] - n[None, :]).to(x.dtype)
        gammas = torch.tensor(self.gammas, device=x.device, dtype=x.dtype)[:, None, None]
        return torch.where(distance >= 0, gammas**distance, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        rows, seq, width = x.shape
        shape = (rows, seq, HEADS, HEAD_DIM)
        q, k, v = (w(x).view(shape).transpose(1, 2) for w in (self.W_Q, self.W_K, self.W_V))
        scores = (q @ k.transpose(-1, -2)) * self.decay(seq, x)[None]
        y = (scores @ v).transpose(1, 2).reshape(rows * seq, width)
        y = self.group_norm(y).view(rows, seq, width)
        return self.W_O(F.silu(self.W_G(x)) * y)


class LinearAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.to_out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        rows, seq, width = x.shape
        q, k, v = (
            part.view(rows, seq, HEADS, HEAD_DIM).transpose(1, 2)
            for part in self.to_qkv(x).chunk(3, dim=-1)
        )
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(dim=2)
        scale = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(dim=2))
        y = torch.einsum("bhnd,bhnde->bhne", q, state) / scale[..., None]
        return self.to_out(y.transpose(1, 2).reshape(rows, seq, width))


class Layer(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer_norm_1, self.layer_norm_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.ffn = nn.Sequential(
            nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(self.layer_norm_1(x)) + x
        return self.ffn(self.layer_norm_2(y)) + y


class SoftmaxFreeLM(nn.Module):
    """forward(x) returns logits. mixer: `Retention` or `LinearAttention`."""

    def __init__(self, mixer: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([Layer(mixer()) for _ in range(LAYERS)])
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)

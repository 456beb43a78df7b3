"""Like modded-nanogpt: rotary caches, value residuals, skip weights, relu squared, a soft cap."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import HEADS, HIDDEN, VOCAB

LAYERS = 4


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


class CastedLinear(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary(nn.Module):
    def __init__(self, dim: int, base: int = 10000) -> None:
        super().__init__()
        self.inv_freq = (1 / base) ** (torch.arange(0, dim, 2) / dim)
        self.seq_len_cached: int | None = None
        self.cos_cached: Tensor | None = None
        self.sin_cached: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        seq_len = x.shape[1]
        if seq_len != self.seq_len_cached:
            t = torch.arange(seq_len, device=x.device)
            freqs = torch.outer(t, self.inv_freq.to(x.device))
            self.seq_len_cached = seq_len
            self.cos_cached, self.sin_cached = freqs.cos(), freqs.sin()
        cos, sin = self.cos_cached[None, :, None, :], self.sin_cached[None, :, None, :]
        x1, x2 = x.chunk(2, dim=3)
        return torch.cat((x1 * cos + x2 * sin, x1 * (-sin) + x2 * cos), 3).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_q, self.c_k, self.c_v = (CastedLinear(HIDDEN, HIDDEN) for _ in range(3))
        self.lambdas = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.rotary = Rotary(HIDDEN // HEADS)
        self.c_proj = CastedLinear(HIDDEN, HIDDEN)
        self.c_proj.weight.data.zero_()

    def forward(self, x: Tensor, v1: Tensor | None) -> tuple[Tensor, Tensor]:
        rows, seq = x.size(0), x.size(1)
        shape = (rows, seq, HEADS, -1)
        q, k, v = (c(x).view(shape) for c in (self.c_q, self.c_k, self.c_v))
        if v1 is None:
            v1 = v
        v = self.lambdas[0] * v + self.lambdas[1] * v1.view_as(v)
        q, k = self.rotary(norm(q)), self.rotary(norm(k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view_as(x)), v1


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = CastedLinear(HIDDEN, 4 * HIDDEN), CastedLinear(4 * HIDDEN, HIDDEN)
        self.c_proj.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(), MLP()
        self.lambdas = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x: Tensor, v1: Tensor | None, x0: Tensor) -> tuple[Tensor, Tensor]:
        x = self.lambdas[0] * x + self.lambdas[1] * x0
        attended, v1 = self.attn(norm(x), v1)
        x = x + attended
        return x + self.mlp(norm(x)), v1


class GPT(nn.Module):
    """forward(idx, target) returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.num_encoder_layers = LAYERS // 2
        self.skip_weights = nn.Parameter(torch.ones(LAYERS // 2))
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, HIDDEN),
                "h": nn.ModuleList([Block() for _ in range(LAYERS)]),
            }
        )
        self.lm_head = CastedLinear(HIDDEN, VOCAB)

    def forward(self, idx: Tensor, target: Tensor) -> Tensor:
        x = norm(self.transformer.wte(idx))
        x0, v1 = x, None
        skips = []
        for i in range(self.num_encoder_layers):
            x, v1 = self.transformer.h[i](x, v1, x0)
            skips.append(x)
        for i in range(LAYERS - self.num_encoder_layers):
            x = x + self.skip_weights[i] * skips.pop()
            x, v1 = self.transformer.h[self.num_encoder_layers + i](x, v1, x0)
        logits = 30 * torch.tanh(self.lm_head(norm(x)) / 30)
        return F.cross_entropy(logits.float().view(-1, logits.size(-1)), target.view(-1))

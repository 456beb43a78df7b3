"""Token mixers without attention: gMLP's spatial gate, gated convolutions, a long FFT filter."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import BLOCK_SIZE, HIDDEN, LAYERS, VOCAB


class SpatialGate(nn.Module):
    """gMLP: half of the features, mixed over time by a causal matrix, gates the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.norm = nn.LayerNorm(2 * HIDDEN)
        self.weight = nn.Parameter(torch.zeros(BLOCK_SIZE, BLOCK_SIZE))
        self.bias = nn.Parameter(torch.ones(BLOCK_SIZE))
        self.proj_out = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        res, gate = F.gelu(self.proj_in(x)).chunk(2, dim=-1)
        mask = torch.ones((n, n), device=x.device, dtype=torch.bool).triu_(1)
        weight = self.weight[:n, :n].masked_fill(mask, 0.0)
        gate = torch.einsum("bnd,mn->bmd", self.norm(gate), weight) + self.bias[:n, None]
        return self.proj_out(gate * res)


class GatedConvolution(nn.Module):
    """After Dauphin and others: a causal convolution gated by another."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d((width - 1, 0), 0.0)
        self.conv = nn.Conv1d(HIDDEN, 2 * HIDDEN, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.conv(self.pad(x.transpose(1, 2))), dim=1).transpose(1, 2)


class LongFilter(nn.Module):
    """Hyena's kernel: a filter as long as the sequence, applied by FFT, between two gates."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.filter = nn.Parameter(torch.randn(HIDDEN, BLOCK_SIZE) * 0.1)
        self.D = nn.Parameter(torch.randn(HIDDEN))
        self.out_proj = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x0, x1, v = self.in_proj(x).transpose(1, 2).chunk(3, dim=1)
        v = v * x1
        spectrum = torch.fft.rfft(self.filter[:, :n], n=2 * n) / (2 * n)
        y = torch.fft.irfft(torch.fft.rfft(v, n=2 * n) * spectrum, n=2 * n, norm="forward")[..., :n]
        y = (y + v * self.D[:, None]) * x0
        return self.out_proj(y.transpose(1, 2))


class MixerLM(nn.Module):
    """forward(x) returns logits. mixer: one of the classes above."""

    def __init__(self, mixer: type[nn.Module]) -> None:
        super().__init__()
        self.to_embed = nn.Embedding(VOCAB, HIDDEN)
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN) for _ in range(LAYERS)])
        self.layers = nn.ModuleList([mixer() for _ in range(LAYERS)])
        self.to_logits = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB))

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_embed(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return self.to_logits(x)

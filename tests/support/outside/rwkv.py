"""Like RWKV: version 1, a learned (head, time, time) matrix; version 4, a recurrence over time."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import BLOCK_SIZE, HEADS, HIDDEN, LAYERS, VOCAB


class TimeMix1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ctx_len = BLOCK_SIZE
        distances = torch.arange(BLOCK_SIZE - 1, -1, -1).float()
        curves = [torch.exp(-distances * (0.1 + 0.2 * head)) for head in range(HEADS)]
        self.time_w = nn.Parameter(torch.stack(curves))
        self.time_alpha = nn.Parameter(torch.ones(HEADS, 1, BLOCK_SIZE))
        self.time_beta = nn.Parameter(torch.ones(HEADS, BLOCK_SIZE, 1))
        self.time_gamma = nn.Parameter(torch.ones(BLOCK_SIZE, 1))
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.key, self.value, self.receptance, self.output = (
            nn.Linear(HIDDEN, HIDDEN) for _ in range(4)
        )

    def weights(self, seq: int) -> Tensor:
        """The circulant matrix of `time_w`: (heads, to, from), zero above the diagonal."""
        total = self.ctx_len
        w = torch.tile(F.pad(self.time_w, (0, total)), [total])
        w = w[:, :-total].reshape(-1, total, 2 * total - 1)[:, :, total - 1 :]
        return w[:, :seq, :seq] * self.time_alpha[:, :, :seq] * self.time_beta[:, :seq, :]

    def forward(self, x: Tensor) -> Tensor:
        rows, seq, width = x.size()
        half = width // 2
        x = torch.cat([self.time_shift(x[:, :, :half]), x[:, :, half:]], dim=-1)
        k = torch.exp(torch.clamp(self.key(x), max=30, min=-60))
        v, r = self.value(x), self.receptance(x)
        sum_k = torch.cumsum(k, dim=1)
        kv = (k * v).view(rows, seq, HEADS, width // HEADS)
        wkv = torch.einsum("htu,buhc->bthc", self.weights(seq), kv).contiguous()
        rwkv = torch.sigmoid(r) * wkv.view(rows, seq, -1) / sum_k
        return self.output(rwkv) * self.time_gamma[:seq, :]


class ChannelMix1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        hidden = 5 * HIDDEN // 2
        self.key, self.value = nn.Linear(HIDDEN, hidden), nn.Linear(HIDDEN, hidden)
        self.weight = nn.Linear(hidden, HIDDEN)
        self.receptance = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        half = x.size(-1) // 2
        x = torch.cat([self.time_shift(x[:, :, :half]), x[:, :, half:]], dim=-1)
        wkv = self.weight(F.mish(self.key(x)) * self.value(x))
        return torch.sigmoid(self.receptance(x)) * wkv


class TimeMix4(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_decay = nn.Parameter(torch.linspace(-3, 1, HIDDEN))
        self.time_first = nn.Parameter(torch.ones(HIDDEN) * -1.2)
        self.time_mix_k = nn.Parameter(torch.linspace(0, 1, HIDDEN)[None, None])
        self.time_mix_v = nn.Parameter(torch.linspace(0, 1, HIDDEN)[None, None])
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.key, self.value, self.receptance, self.output = (
            nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        before = self.time_shift(x)
        k = self.key(x * self.time_mix_k + before * (1 - self.time_mix_k))
        v = self.value(x * self.time_mix_v + before * (1 - self.time_mix_v))
        r = torch.sigmoid(self.receptance(x))
        decay = -torch.exp(self.time_decay)
        top = below = torch.zeros_like(k[:, 0])
        largest = torch.full_like(k[:, 0], -1e38)
        outputs = []
        for t in range(x.size(1)):
            now_k, now_v = k[:, t], v[:, t]
            peak = torch.maximum(largest, self.time_first + now_k)
            old, new = torch.exp(largest - peak), torch.exp(self.time_first + now_k - peak)
            outputs.append((old * top + new * now_v) / (old * below + new))
            peak = torch.maximum(largest + decay, now_k)
            old, new = torch.exp(largest + decay - peak), torch.exp(now_k - peak)
            top, below, largest = old * top + new * now_v, old * below + new, peak
        return self.output(r * torch.stack(outputs, dim=1))


class ChannelMix4(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.time_mix_k = nn.Parameter(torch.linspace(0, 1, HIDDEN)[None, None])
        self.key = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.receptance = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.value = nn.Linear(4 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x * self.time_mix_k + self.time_shift(x) * (1 - self.time_mix_k)
        kv = self.value(torch.square(torch.relu(self.key(mixed))))
        return torch.sigmoid(self.receptance(mixed)) * kv


class Block(nn.Module):
    def __init__(self, time_mix: nn.Module, channel_mix: nn.Module) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attn, self.mlp = time_mix, channel_mix

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class RWKV(nn.Module):
    """forward(idx, targets) returns (logits, loss). version: 1 or 4."""

    def __init__(self, version: int) -> None:
        super().__init__()
        time_mix, channel_mix = {1: (TimeMix1, ChannelMix1), 4: (TimeMix4, ChannelMix4)}[version]
        self.emb = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.Sequential(*[Block(time_mix(), channel_mix()) for _ in range(LAYERS)])
        self.ln_out = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.head(self.ln_out(self.blocks(self.emb(idx))))
        if targets is None:
            return x, None
        return x, F.cross_entropy(x.view(-1, x.size(-1)), targets.view(-1))

"""Like minGPT: a closure over a module dict as the MLP, and a hand-written GELU."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import BLOCK_SIZE, HIDDEN, LAYERS, VOCAB
from tests.support.outside.nanogpt import CausalSelfAttention


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        return 0.5 * x * (1.0 + torch.tanh(inner))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(HIDDEN)
        self.attn = CausalSelfAttention(bias=True, flash=False)
        self.ln_2 = nn.LayerNorm(HIDDEN)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(HIDDEN, 4 * HIDDEN),
                "c_proj": nn.Linear(4 * HIDDEN, HIDDEN),
                "act": NewGELU(),
                "dropout": nn.Dropout(0.0),
            }
        )
        m = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class GPT(nn.Module):
    """forward(idx, targets) returns (logits, loss); targets of -1 are ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.block_size = BLOCK_SIZE
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, HIDDEN),
                "wpe": nn.Embedding(BLOCK_SIZE, HIDDEN),
                "h": nn.ModuleList([Block() for _ in range(LAYERS)]),
                "ln_f": nn.LayerNorm(HIDDEN),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        _, seq = idx.size()
        pos = torch.arange(0, seq, dtype=torch.long, device=idx.device).unsqueeze(0)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = None
        if targets is not None:
            flat = logits.view(-1, logits.size(-1))
            loss = F.cross_entropy(flat, targets.view(-1), ignore_index=-1)
        return logits, loss

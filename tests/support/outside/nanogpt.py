"""Like nanoGPT: packed c_attn, optional biases, tied embeddings, (logits, loss) returned."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import BLOCK_SIZE, HEADS, HIDDEN, LAYERS, VOCAB


class LayerNorm(nn.Module):
    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, bias: bool, flash: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(HIDDEN, 3 * HIDDEN, bias=bias)
        self.c_proj = nn.Linear(HIDDEN, HIDDEN, bias=bias)
        self.flash = flash
        if not flash:
            mask = torch.tril(torch.ones(BLOCK_SIZE, BLOCK_SIZE))
            self.register_buffer("bias", mask.view(1, 1, BLOCK_SIZE, BLOCK_SIZE))

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        shape = (batch, seq, HEADS, width // HEADS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in (q, k, v))
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=True)
        else:
            scores = (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5
            scores = scores.masked_fill(self.bias[:, :, :seq, :seq] == 0, float("-inf"))
            y = F.softmax(scores, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, seq, width))


class MLP(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(HIDDEN, 4 * HIDDEN, bias=bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * HIDDEN, HIDDEN, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, bias: bool, flash: bool) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(HIDDEN, bias)
        self.attn = CausalSelfAttention(bias, flash)
        self.ln_2 = LayerNorm(HIDDEN, bias)
        self.mlp = MLP(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """forward(idx, targets) returns (logits, loss); targets of -1 are ignored."""

    def __init__(self, *, bias: bool = True, flash: bool = True, layers: int = LAYERS) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB, HIDDEN),
                "wpe": nn.Embedding(BLOCK_SIZE, HIDDEN),
                "drop": nn.Dropout(0.0),
                "h": nn.ModuleList([Block(bias, flash) for _ in range(layers)]),
                "ln_f": LayerNorm(HIDDEN, bias),
            }
        )
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        _, seq = idx.size()
        assert seq <= BLOCK_SIZE, f"cannot forward {seq} tokens, the block size is {BLOCK_SIZE}"
        pos = torch.arange(0, seq, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        flat = logits.view(-1, logits.size(-1))
        return logits, F.cross_entropy(flat, targets.view(-1), ignore_index=-1)

"""Like the GPT of a well-known book: three separate projections, masks filled in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support.outside import BLOCK_SIZE, HEADS, HIDDEN, LAYERS, VOCAB


class MultiHeadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_query = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.W_key = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.W_value = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.out_proj = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("mask", torch.triu(torch.ones(BLOCK_SIZE, BLOCK_SIZE), diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        rows, num_tokens, _ = x.shape
        shape = (rows, num_tokens, HEADS, HIDDEN // HEADS)
        keys = self.W_key(x).view(shape).transpose(1, 2)
        queries = self.W_query(x).view(shape).transpose(1, 2)
        values = self.W_value(x).view(shape).transpose(1, 2)
        scores = queries @ keys.transpose(2, 3)
        scores.masked_fill_(self.mask.bool()[:num_tokens, :num_tokens], -torch.inf)
        weights = torch.softmax(scores / keys.shape[-1] ** 0.5, dim=-1)
        context = (weights @ values).transpose(1, 2)
        return self.out_proj(context.contiguous().view(rows, num_tokens, HIDDEN))


class LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(HIDDEN))
        self.shift = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, unbiased=False)
        return self.scale * (x - mean) / torch.sqrt(var + self.eps) + self.shift


class GELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        root = torch.sqrt(torch.tensor(2.0 / torch.pi))
        return 0.5 * x * (1 + torch.tanh(root * (x + 0.044715 * torch.pow(x, 3))))


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att = MultiHeadAttention()
        wide, narrow = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)
        self.ff = nn.Sequential(wide, GELU(), narrow)
        self.norm1, self.norm2 = LayerNorm(), LayerNorm()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.att(self.norm1(x)) + shortcut
        shortcut = x
        return self.ff(self.norm2(x)) + shortcut


class GPTModel(nn.Module):
    """forward(in_idx) returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(VOCAB, HIDDEN)
        self.pos_emb = nn.Embedding(BLOCK_SIZE, HIDDEN)
        self.trf_blocks = nn.Sequential(*[TransformerBlock() for _ in range(LAYERS)])
        self.final_norm = LayerNorm()
        self.out_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, in_idx: Tensor) -> Tensor:
        _, seq_len = in_idx.shape
        positions = self.pos_emb(torch.arange(seq_len, device=in_idx.device))
        x = self.trf_blocks(self.tok_emb(in_idx) + positions)
        return self.out_head(self.final_norm(x))

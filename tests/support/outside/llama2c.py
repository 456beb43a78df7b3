"""Like llama2.c's model.py: real rotary buffers, and the loss left behind as an attribute."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import BLOCK_SIZE, HEADS, HIDDEN, LAYERS, VOCAB

KV_HEADS = 2
HEAD_DIM = HIDDEN // HEADS


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    angles = torch.outer(torch.arange(end), freqs).float()
    return torch.cos(angles), torch.sin(angles)


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    shape = [d if i in (1, real.ndim - 1) else 1 for i, d in enumerate(real.shape)]
    cos, sin = cos.view(shape), sin.view(shape)
    turned = [real * cos - imaginary * sin, real * sin + imaginary * cos]
    return torch.stack(turned, dim=-1).flatten(3).type_as(x)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    rows, seq, heads, dim = x.shape
    if n_rep == 1:
        return x
    wide = x[:, :, :, None, :].expand(rows, seq, heads, n_rep, dim)
    return wide.reshape(rows, seq, heads * n_rep, dim)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.wk = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.wv = nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        mask = torch.full((1, 1, BLOCK_SIZE, BLOCK_SIZE), float("-inf"))
        self.register_buffer("mask", torch.triu(mask, diagonal=1), persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, seq, _ = x.shape
        xq = self.wq(x).view(rows, seq, HEADS, HEAD_DIM)
        xk = self.wk(x).view(rows, seq, KV_HEADS, HEAD_DIM)
        xv = self.wv(x).view(rows, seq, KV_HEADS, HEAD_DIM)
        xq, xk = apply_rotary_emb(xq, cos, sin), apply_rotary_emb(xk, cos, sin)
        xk, xv = repeat_kv(xk, HEADS // KV_HEADS), repeat_kv(xv, HEADS // KV_HEADS)
        xq, xk, xv = xq.transpose(1, 2), xk.transpose(1, 2), xv.transpose(1, 2)
        scores = torch.matmul(xq, xk.transpose(2, 3)) / math.sqrt(HEAD_DIM)
        scores = F.softmax((scores + self.mask[:, :, :seq, :seq]).float(), dim=-1).type_as(xq)
        output = torch.matmul(scores, xv).transpose(1, 2).contiguous()
        return self.wo(output.view(rows, seq, -1))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)
        self.w2 = nn.Linear(3 * HIDDEN, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = RMSNorm(HIDDEN), RMSNorm(HIDDEN)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = x + self.attention.forward(self.attention_norm(x), cos, sin)
        return h + self.feed_forward.forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """forward(tokens, targets) returns logits and leaves `last_loss` behind."""

    last_loss: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([TransformerBlock() for _ in range(LAYERS)])
        self.norm = RMSNorm(HIDDEN)
        self.output = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.tok_embeddings.weight = self.output.weight
        cos, sin = precompute_freqs_cis(HEAD_DIM, BLOCK_SIZE)
        self.register_buffer("freqs_cos", cos, persistent=False)
        self.register_buffer("freqs_sin", sin, persistent=False)
        self.last_loss = None

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        _, seq = tokens.shape
        h = self.tok_embeddings(tokens)
        cos, sin = self.freqs_cos[:seq], self.freqs_sin[:seq]
        for layer in self.layers:
            h = layer(h, cos, sin)
        h = self.norm(h)
        if targets is None:
            self.last_loss = None
            return self.output(h[:, [-1], :])
        logits = self.output(h)
        flat = logits.view(-1, logits.size(-1))
        self.last_loss = F.cross_entropy(flat, targets.view(-1), ignore_index=-1)
        return logits

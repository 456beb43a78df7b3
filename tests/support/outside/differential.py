"""Like the Differential Transformer: the difference of two softmaxes under a learned weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import HIDDEN, LAYERS, VOCAB

HEADS = 2
HEAD_DIM = HIDDEN // HEADS // 2


class MultiheadDiffAttn(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4)
        )
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(torch.randn(HEAD_DIM) * 0.1) for _ in range(4)
        )
        self.subln = nn.RMSNorm(2 * HEAD_DIM, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        rows, seq, width = x.size()
        q = self.q_proj(x).view(rows, seq, 2 * HEADS, HEAD_DIM).transpose(1, 2)
        k = self.k_proj(x).view(rows, seq, 2 * HEADS, HEAD_DIM).transpose(1, 2)
        v = self.v_proj(x).view(rows, seq, HEADS, 2 * HEAD_DIM).transpose(1, 2)
        scores = torch.matmul(q * HEAD_DIM**-0.5, k.transpose(-1, -2))
        mask = torch.triu(torch.zeros([seq, seq]).float().fill_(float("-inf")), 1)
        scores = torch.nan_to_num(scores) + mask.type_as(scores)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        one = torch.exp(torch.sum(self.lambda_q1 * self.lambda_k1, dim=-1).float()).type_as(q)
        two = torch.exp(torch.sum(self.lambda_q2 * self.lambda_k2, dim=-1).float()).type_as(q)
        weights = weights.view(rows, HEADS, 2, seq, seq)
        weights = weights[:, :, 0] - (one - two + self.lambda_init) * weights[:, :, 1]
        attn = self.subln(torch.matmul(weights, v)) * (1 - self.lambda_init)
        return self.out_proj(attn.transpose(1, 2).reshape(rows, seq, width))


class DiffLM(nn.Module):
    """forward(x) returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.attn = nn.ModuleList([MultiheadDiffAttn(depth) for depth in range(LAYERS)])
        self.ffn = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(HIDDEN, 64), nn.SiLU(), nn.Linear(64, HIDDEN))
                for _ in range(LAYERS)
            ]
        )
        self.norms = nn.ModuleList([nn.RMSNorm(HIDDEN) for _ in range(2 * LAYERS + 1)])
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i, (attn, ffn) in enumerate(zip(self.attn, self.ffn, strict=True)):
            h = h + attn(self.norms[2 * i](h))
            h = h + ffn(self.norms[2 * i + 1](h))
        return self.head(self.norms[-1](h))

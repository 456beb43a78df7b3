"""Mixtures of experts: one that computes all of them, one that picks rows of tokens by masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import HIDDEN, LAYERS, VOCAB
from tests.support.outside.nanogpt import CausalSelfAttention

EXPERTS, TOP_K = 4, 2


class DenseExperts(nn.Module):
    """Like gpt-fast's mixtral: stacked weights, all experts by einsum, the chosen ones weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.w1 = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, HIDDEN) * 0.1)
        self.w2 = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * HIDDEN) * 0.1)
        self.w3 = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, HIDDEN) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, HIDDEN)
        scores = F.softmax(self.gate(flat), dim=-1)
        weights, chosen = torch.topk(scores, TOP_K, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        x1 = F.silu(torch.einsum("ti,eoi->teo", flat, self.w1))
        x3 = torch.einsum("ti,eoi->teo", flat, self.w3)
        all_out = torch.einsum("teo,eio->tei", x1 * x3, self.w2)
        picked = torch.gather(all_out, 1, chosen[..., None].expand(-1, -1, HIDDEN))
        return torch.einsum("tai,ta->ti", picked, weights).view_as(x)


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.relu(self.w1(x)))


class MaskedExperts(nn.Module):
    """Like makeMoE: noisy top-k without the noise; every expert sees its rows, others get zero."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS)
        self.experts = nn.ModuleList([Expert() for _ in range(EXPERTS)])

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        top, indices = logits.topk(TOP_K, dim=-1)
        sparse = torch.full_like(logits, float("-inf")).scatter(-1, indices, top)
        gates = F.softmax(sparse, dim=-1)
        final = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            final = (
                final
                + torch.where(gates[..., i : i + 1] > 0, expert(x), 0.0) * (gates[..., i : i + 1])
            )
        return final


class RowExperts(MaskedExperts):
    """The same, reading only an expert's own rows: their number depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        flat, final = x.view(-1, HIDDEN), torch.zeros_like(x).view(-1, HIDDEN)
        weights, chosen = torch.topk(F.softmax(self.router(flat), dim=-1), TOP_K)
        for i, expert in enumerate(self.experts):
            rows, nth = torch.where(chosen == i)
            final[rows] += weights[rows, nth, None] * expert(flat[rows])
        return final.view_as(x)


class MoELM(nn.Module):
    """forward(x) returns logits. experts: one of the classes above."""

    def __init__(self, experts: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.attention = nn.ModuleList(
            [CausalSelfAttention(bias=False, flash=True) for _ in range(LAYERS)]
        )
        self.experts = nn.ModuleList([experts() for _ in range(LAYERS)])
        self.norms = nn.ModuleList([nn.LayerNorm(HIDDEN) for _ in range(2 * LAYERS)])
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i, (attention, experts) in enumerate(zip(self.attention, self.experts, strict=True)):
            h = h + attention(self.norms[2 * i](h))
            h = h + experts(self.norms[2 * i + 1](h))
        return self.head(h)

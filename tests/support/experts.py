"""A small mixture of experts whose experts are one batched product: all of them on every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Experts(nn.Module):
    """A residual block: the sum of every expert's output, weighted by a router."""

    def __init__(self, hidden: int, num_experts: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.router = nn.Linear(hidden, num_experts)
        self.up = nn.Parameter(torch.empty(num_experts, hidden, 2 * hidden))
        self.down = nn.Parameter(torch.empty(num_experts, 2 * hidden, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.up, std=0.1)
        nn.init.normal_(self.down, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(0, 1)
        weights = self.router(tokens).softmax(-1)
        each = torch.bmm(tokens.unsqueeze(0).expand(len(self.up), -1, -1), self.up)
        each = torch.bmm(F.silu(each), self.down)
        return x + (each * weights.t().unsqueeze(-1)).sum(0).view_as(x)


class MixtureOfExperts(nn.Module):
    """A language model without attention: embedding, blocks of experts, a head."""

    def __init__(
        self, vocab: int, hidden: int = 16, num_layers: int = 2, num_experts: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden)
        self.layers = nn.ModuleList(Experts(hidden, num_experts) for _ in range(num_layers))
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

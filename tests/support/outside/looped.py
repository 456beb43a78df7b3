"""Like a universal transformer: one block, applied several times with a signal of the step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support.outside import BLOCK_SIZE, HIDDEN, VOCAB
from tests.support.outside.nanogpt import Block


class UniversalTransformer(nn.Module):
    """forward(x) returns logits."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.depth = depth
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(BLOCK_SIZE, HIDDEN)
        self.steps = nn.Embedding(depth, HIDDEN)
        self.block = Block(bias=True, flash=True)
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        positions = self.positions(torch.arange(x.shape[1], device=x.device))
        for step in range(self.depth):
            h = self.block(h + positions + self.steps.weight[step])
        return self.norm(h) @ self.embedding.weight.t()

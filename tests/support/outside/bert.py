"""Like BERT-pytorch: summed embeddings with segments, a padding mask, masked tokens as labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import HEADS, HIDDEN, LAYERS, SEQ, VOCAB


class BERTEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, HIDDEN, padding_idx=0)
        self.segment = nn.Embedding(3, HIDDEN, padding_idx=0)
        pe = torch.zeros(SEQ, HIDDEN).float()
        pe.requires_grad = False
        position = torch.arange(0, SEQ).float().unsqueeze(1)
        div_term = (torch.arange(0, HIDDEN, 2).float() * -(math.log(10000.0) / HIDDEN)).exp()
        pe[:, 0::2], pe[:, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(0))

    def forward(self, sequence: Tensor, segment_label: Tensor) -> Tensor:
        x = self.token(sequence) + self.pe[:, : sequence.size(1)]
        return x + self.segment(segment_label)


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear_layers = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(3)])
        self.output_linear = nn.Linear(HIDDEN, HIDDEN)
        self.w_1, self.w_2 = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)
        self.norm_1, self.norm_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        rows = x.size(0)
        q, k, v = (
            linear(x).view(rows, -1, HEADS, HIDDEN // HEADS).transpose(1, 2)
            for linear in self.linear_layers
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        p_attn = F.softmax(scores.masked_fill(mask == 0, -1e9), dim=-1)
        x = torch.matmul(p_attn, v).transpose(1, 2).contiguous().view(rows, -1, HIDDEN)
        return self.output_linear(x)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attend(self.norm_1(x), mask)
        return x + self.w_2(F.gelu(self.w_1(self.norm_2(x))))


class BERTLM(nn.Module):
    """forward(x, segment_label) returns (next sentence, masked tokens), both log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = BERTEmbedding()
        self.transformer_blocks = nn.ModuleList([TransformerBlock() for _ in range(LAYERS)])
        self.next_sentence = nn.Linear(HIDDEN, 2)
        self.mask_lm = nn.Linear(HIDDEN, VOCAB)

    def forward(self, x: Tensor, segment_label: Tensor) -> tuple[Tensor, Tensor]:
        mask = (x > 0).unsqueeze(1).repeat(1, x.size(1), 1).unsqueeze(1)
        x = self.embedding(x, segment_label)
        for transformer in self.transformer_blocks:
            x = transformer.forward(x, mask)
        return self.next_sentence(x[:, 0]).log_softmax(-1), self.mask_lm(x).log_softmax(-1)

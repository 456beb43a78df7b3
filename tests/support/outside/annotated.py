"""Like the Annotated Transformer: cloned layers, a sinusoidal buffer, log-softmax and KL loss."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from tests.support.outside import BLOCK_SIZE, HEADS, HIDDEN, LAYERS, VOCAB


def clones(module: nn.Module, n: int) -> nn.ModuleList:
    return nn.ModuleList([copy.deepcopy(module) for _ in range(n)])


class LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a_2, self.b_2 = nn.Parameter(torch.ones(HIDDEN)), nn.Parameter(torch.zeros(HIDDEN))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return self.a_2 * (x - mean) / (std + self.eps) + self.b_2


class MultiHeadedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d_k, self.h = HIDDEN // HEADS, HEADS
        self.linears = clones(nn.Linear(HIDDEN, HIDDEN), 4)
        self.attn = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        rows = query.size(0)
        query, key, value = (
            lin(x).view(rows, -1, self.h, self.d_k).transpose(1, 2)
            for lin, x in zip(self.linears, (query, key, value), strict=False)
        )
        scores = torch.matmul(query, key.transpose(-2, -1)) / math.sqrt(self.d_k)
        self.attn = scores.masked_fill(mask.unsqueeze(1) == 0, -1e9).softmax(dim=-1)
        x = torch.matmul(self.attn, value).transpose(1, 2).contiguous()
        return self.linears[-1](x.view(rows, -1, self.h * self.d_k))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(self.w_1(x).relu())


class SublayerConnection(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm()

    def forward(self, x: Tensor, sublayer) -> Tensor:
        return x + sublayer(self.norm(x))


class Layer(nn.Module):
    def __init__(self, num_attentions: int) -> None:
        super().__init__()
        self.attentions = clones(MultiHeadedAttention(), num_attentions)
        self.feed_forward = FeedForward()
        self.sublayer = clones(SublayerConnection(), num_attentions + 1)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.sublayer[0](x, lambda x: self.attentions[0](x, x, x, mask))
        if memory is not None:
            whole = torch.ones(1, 1, memory.size(1), dtype=torch.bool, device=x.device)
            x = self.sublayer[1](x, lambda x: self.attentions[1](x, memory, memory, whole))
        return self.sublayer[-1](x, self.feed_forward)


class PositionalEncoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pe = torch.zeros(BLOCK_SIZE, HIDDEN)
        position = torch.arange(0, BLOCK_SIZE).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, HIDDEN, 2) * -(math.log(10000.0) / HIDDEN))
        pe[:, 0::2], pe[:, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
        self.register_buffer("pe", pe.unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pe[:, : x.size(1)].requires_grad_(False)


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lut = nn.Embedding(VOCAB, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.lut(x) * math.sqrt(HIDDEN)


class EncoderDecoder(nn.Module):
    """forward(src, tgt) returns log-probabilities of the next target token."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = clones(Layer(1), LAYERS), clones(Layer(2), LAYERS)
        self.encoder_norm, self.decoder_norm = LayerNorm(), LayerNorm()
        self.src_embed = nn.Sequential(Embeddings(), PositionalEncoding())
        self.tgt_embed = nn.Sequential(Embeddings(), PositionalEncoding())
        self.generator = nn.Linear(HIDDEN, VOCAB)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        whole = torch.ones(1, 1, src.size(1), dtype=torch.bool, device=src.device)
        seq = tgt.size(1)
        causal = torch.triu(torch.ones(1, seq, seq, device=tgt.device), diagonal=1) == 0
        memory = self.src_embed(src)
        for layer in self.encoder:
            memory = layer(memory, whole)
        memory = self.encoder_norm(memory)
        x = self.tgt_embed(tgt)
        for layer in self.decoder:
            x = layer(x, causal, memory)
        return torch.log_softmax(self.generator(self.decoder_norm(x)), dim=-1)

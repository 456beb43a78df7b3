"""Like gpt-fast: rotary table and mask as plain attributes, indexed by given positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import BLOCK_SIZE, HEADS, HIDDEN, LAYERS, VOCAB
from tests.support.outside.llama2c import FeedForward, RMSNorm

KV_HEADS = 2
HEAD_DIM = HIDDEN // HEADS


def precompute_freqs_cis(seq_len: int, n_elem: int, base: int = 10000) -> Tensor:
    freqs = 1.0 / (base ** (torch.arange(0, n_elem, 2)[: (n_elem // 2)].float() / n_elem))
    angles = torch.outer(torch.arange(seq_len), freqs)
    turns = torch.polar(torch.ones_like(angles), angles)
    return torch.stack([turns.real, turns.imag], dim=-1)


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    pairs = x.float().reshape(*x.shape[:-1], -1, 2)
    freqs_cis = freqs_cis.view(1, pairs.size(1), 1, pairs.size(3), 2)
    turned = torch.stack(
        [
            pairs[..., 0] * freqs_cis[..., 0] - pairs[..., 1] * freqs_cis[..., 1],
            pairs[..., 1] * freqs_cis[..., 0] + pairs[..., 0] * freqs_cis[..., 1],
        ],
        -1,
    )
    return turned.flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wqkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.kv_cache = None

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        rows, seq, _ = x.shape
        kv_size = KV_HEADS * HEAD_DIM
        q, k, v = self.wqkv(x).split([HIDDEN, kv_size, kv_size], dim=-1)
        q = apply_rotary_emb(q.view(rows, seq, HEADS, HEAD_DIM), freqs_cis)
        k = apply_rotary_emb(k.view(rows, seq, KV_HEADS, HEAD_DIM), freqs_cis)
        v = v.view(rows, seq, KV_HEADS, HEAD_DIM)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        k = k.repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = v.repeat_interleave(HEADS // KV_HEADS, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(y.transpose(1, 2).contiguous().view(rows, seq, HIDDEN))


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.ffn_norm, self.attention_norm = RMSNorm(HIDDEN), RMSNorm(HIDDEN)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """forward(idx, input_pos) returns logits; `setup_caches` must have been called."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(TransformerBlock() for _ in range(LAYERS))
        self.norm = RMSNorm(HIDDEN)
        self.output = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.freqs_cis: Tensor | None = None
        self.causal_mask: Tensor | None = None

    def setup_caches(self) -> None:
        self.freqs_cis = precompute_freqs_cis(BLOCK_SIZE, HEAD_DIM)
        self.causal_mask = torch.tril(torch.ones(BLOCK_SIZE, BLOCK_SIZE, dtype=torch.bool))

    def forward(self, idx: Tensor, input_pos: Tensor | None = None) -> Tensor:
        assert self.freqs_cis is not None, "Caches must be initialized first"
        if input_pos is None:
            input_pos = torch.arange(idx.shape[1], device=idx.device)
        mask = self.causal_mask[None, None, input_pos][..., : idx.shape[1]]
        freqs_cis = self.freqs_cis[input_pos]
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x, freqs_cis, mask)
        return self.output(self.norm(x))

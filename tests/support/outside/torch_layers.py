"""Models made of torch's own layers, as its tutorials do: nn.TransformerEncoder, nn.Transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.support.outside import BLOCK_SIZE, HEADS, HIDDEN, LAYERS, VOCAB


class EncoderLM(nn.Module):
    """forward(src) returns logits; the causal mask is made once and kept as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.src_mask: Tensor | None = None
        self.input_emb = nn.Embedding(VOCAB, HIDDEN)
        self.position = nn.Parameter(torch.zeros(1, BLOCK_SIZE, HIDDEN))
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 2 * HIDDEN, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.decoder = nn.Linear(HIDDEN, VOCAB)

    def forward(self, src: Tensor) -> Tensor:
        seq = src.size(1)
        if self.src_mask is None or self.src_mask.size(0) != seq:
            mask = torch.log(torch.tril(torch.ones(seq, seq))).to(src.device)
            self.src_mask = mask.to(self.position.dtype)
        x = self.input_emb(src) * HIDDEN**0.5 + self.position[:, :seq]
        return self.decoder(self.encoder(x, self.src_mask))


class Seq2Seq(nn.Module):
    """forward(src, tgt) returns logits of the next target token."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(
            HIDDEN, HEADS, LAYERS, LAYERS, 2 * HIDDEN, 0.0, batch_first=True, norm_first=True
        )
        self.src_tok_emb = nn.Embedding(VOCAB, HIDDEN)
        self.tgt_tok_emb = nn.Embedding(VOCAB, HIDDEN)
        self.generator = nn.Linear(HIDDEN, VOCAB)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        source, target = self.src_tok_emb(src), self.tgt_tok_emb(tgt)
        mask = nn.Transformer.generate_square_subsequent_mask(
            tgt.size(1), device=tgt.device, dtype=target.dtype
        )
        return self.generator(self.transformer(source, target, tgt_mask=mask))

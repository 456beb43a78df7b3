"""A transformer in a page, with what makes pipelines go wrong: see `TinyTransformer`."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.experts import Experts

VOCAB, HIDDEN, HEADS, SEQ = 32, 16, 2, 8


class Block(nn.Module):
    """Pre-norm attention, with a rotary table and a mask from outside, and an MLP."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(q * cos, k * cos, v, mask)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.down(F.silu(self.up(self.norm2(x))))


class TinyTransformer(nn.Module):
    """Rotary table and mask used in every block, a scale buffer, a constant, dropout on request.

    skip: the embedding is added again before the head. tied: the head is the embedding. early: the
    output of the first block is an output of the model, beside the loss. experts: a mixture of
    them before the head.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 4,
        vocab: int = VOCAB,
        skip: bool = False,
        tied: bool = False,
        early: bool = False,
        dropout: float = 0.0,
        experts: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, HIDDEN)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(num_blocks))
        self.experts = Experts(HIDDEN) if experts else nn.Identity()
        self.head = nn.Linear(HIDDEN, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.skip, self.early = skip, early
        self.register_buffer("frequency", torch.linspace(0.1, 1.0, HIDDEN // HEADS))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = positions[:, None] >= positions[None, :]
        cos = (positions[:, None] * self.frequency).cos()
        embedded = x = self.embed(input_ids)
        outputs = {}
        for index, block in enumerate(self.blocks):
            x = block(x, cos, mask)
            if self.early and index == 0:
                outputs["early"] = x
        if self.skip:
            x = x + embedded
        logits = self.head(self.experts(x))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits, **outputs}

    def example_inputs(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Two rows of tokens."""
        return {"input_ids": ((2, SEQ), torch.int64), "labels": ((2, SEQ), torch.int64)}

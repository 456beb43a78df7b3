"""Pieces that InternLM and InternLM2 share: the MLP, the output head, the loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ilm_compile.models.norm import LOW_PRECISION

IGNORED_LABEL = -100


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself, but only `scale` of its gradient flows back (GLM-130B, arXiv:2210.02414)."""
    return x if scale == 1 else scale * x + (1 - scale) * x.detach()


class MLP(nn.Module):
    """w2(silu(w1 x) * w3 x): w1 gate, w3 up, w2 down (SwiGLU, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.w3 = nn.Linear(hidden_size, ffn_hidden_size, bias=False)
        self.w2 = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class OutputHead(nn.Module):
    """Logits over the vocabulary.

    unit_rows: rows of the weight are scaled to length 1 first (norm_head).
    """

    def __init__(
        self, hidden_size: int, vocab_size: int, *, grad_scale: float, unit_rows: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.grad_scale = grad_scale
        self.unit_rows = unit_rows

    def forward(self, x: Tensor) -> Tensor:
        weight = scale_gradient(self.weight, self.grad_scale)
        return F.linear(x, F.normalize(weight) if self.unit_rows else weight)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the labels that are not -100.

    logits: (batch, seq, vocab); labels: (batch, seq), where labels[:, t] is the target of position
    t: nothing is shifted here.
    """
    if logits.dtype in LOW_PRECISION:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)

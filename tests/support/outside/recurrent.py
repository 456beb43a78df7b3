"""Recurrent language models: an nn.LSTM, a GRU cell in a loop, and minGRU's scan in log space."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import HIDDEN, LAYERS, VOCAB


class LSTMModel(nn.Module):
    """Like word_language_model's: forward(input) returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.0)
        self.encoder = nn.Embedding(VOCAB, HIDDEN)
        self.rnn = nn.LSTM(HIDDEN, HIDDEN, LAYERS, batch_first=True)
        self.decoder = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input: Tensor) -> Tensor:
        output, _ = self.rnn(self.drop(self.encoder(input)))
        return self.decoder(self.drop(output))


class GRUCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.xh_to_z, self.xh_to_r, self.xh_to_hbar = (
            nn.Linear(2 * HIDDEN, HIDDEN) for _ in range(3)
        )

    def forward(self, xt: Tensor, hprev: Tensor) -> Tensor:
        xh = torch.cat([xt, hprev], dim=1)
        r, z = torch.sigmoid(self.xh_to_r(xh)), torch.sigmoid(self.xh_to_z(xh))
        hbar = torch.tanh(self.xh_to_hbar(torch.cat([xt, r * hprev], dim=1)))
        return (1 - z) * hprev + z * hbar


class MakemoreRNN(nn.Module):
    """Like makemore's RNN: a learned start, a cell per time step, (logits, loss) returned."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.zeros(1, HIDDEN))
        self.wte = nn.Embedding(VOCAB, HIDDEN)
        self.cell = GRUCell()
        self.lm_head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        rows, seq = idx.size()
        emb = self.wte(idx)
        hprev = self.start.expand((rows, -1))
        hiddens = []
        for i in range(seq):
            hprev = self.cell(emb[:, i, :], hprev)
            hiddens.append(hprev)
        logits = self.lm_head(torch.stack(hiddens, 1))
        if targets is None:
            return logits, None
        flat = logits.view(-1, logits.size(-1))
        return logits, F.cross_entropy(flat, targets.view(-1), ignore_index=-1)


class MakemoreMLP(nn.Module):
    """Like makemore's MLP after Bengio: the ids rolled, with a special token before the start."""

    def __init__(self, context: int = 4) -> None:
        super().__init__()
        self.context = context
        self.wte = nn.Embedding(VOCAB + 1, HIDDEN)
        self.mlp = nn.Sequential(
            nn.Linear(context * HIDDEN, 2 * HIDDEN), nn.Tanh(), nn.Linear(2 * HIDDEN, VOCAB)
        )

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        embs = []
        for _ in range(self.context):
            embs.append(self.wte(idx))
            idx = torch.roll(idx, 1, 1)
            idx[:, 0] = VOCAB
        logits = self.mlp(torch.cat(embs, -1))
        if targets is None:
            return logits, None
        flat = logits.view(-1, logits.size(-1))
        return logits, F.cross_entropy(flat, targets.view(-1), ignore_index=-1)


class MinGRU(nn.Module):
    """A block of minGRU: h_t = (1 - z_t) h_(t-1) + z_t g(x_t), scanned in parallel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.to_hidden_and_gate = nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.to_out = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.to_hidden_and_gate(self.norm(x)).chunk(2, dim=-1)
        log_coeffs, log_z = -F.softplus(gate), -F.softplus(-gate)
        log_g = torch.where(hidden >= 0, (F.relu(hidden) + 0.5).log(), -F.softplus(-hidden))
        a_star = log_coeffs.cumsum(dim=1)
        log_h = a_star + (log_z + log_g - a_star).logcumsumexp(dim=1)
        return x + self.to_out(log_h.exp())


class MinGRULM(nn.Module):
    """forward(x) returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([MinGRU() for _ in range(LAYERS)])
        self.norm = nn.RMSNorm(HIDDEN)
        self.to_logits = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_emb(x)
        for layer in self.layers:
            x = layer(x)
        return self.to_logits(self.norm(x))

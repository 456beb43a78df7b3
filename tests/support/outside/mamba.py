"""Like mamba-minimal: a depthwise convolution and a selective scan written as a loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.outside import HIDDEN, LAYERS, VOCAB
from tests.support.outside.llama2c import RMSNorm

INNER, STATE, RANK, WIDTH = 2 * HIDDEN, 4, 2, 4


class MambaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        self.conv1d = nn.Conv1d(INNER, INNER, WIDTH, groups=INNER, padding=WIDTH - 1)
        self.x_proj = nn.Linear(INNER, RANK + 2 * STATE, bias=False)
        self.dt_proj = nn.Linear(RANK, INNER)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, STATE + 1).repeat(INNER, 1)))
        self.D = nn.Parameter(torch.ones(INNER))
        self.out_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seq = x.shape[1]
        x, gate = self.in_proj(x).split([INNER, INNER], dim=-1)
        x = self.conv1d(x.transpose(1, 2))[:, :, :seq].transpose(1, 2)
        y = self.ssm(F.silu(x))
        return self.out_proj(y * F.silu(gate))

    def ssm(self, x: Tensor) -> Tensor:
        a = -torch.exp(self.A_log.float())
        delta, b, c = self.x_proj(x).split([RANK, STATE, STATE], dim=-1)
        delta = F.softplus(self.dt_proj(delta))
        decay = torch.exp(torch.einsum("bld,dn->bldn", delta, a))
        update = torch.einsum("bld,bln,bld->bldn", delta, b, x)
        state = torch.zeros((x.shape[0], INNER, STATE), device=decay.device, dtype=decay.dtype)
        outputs = []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + update[:, t]
            outputs.append(torch.einsum("bdn,bn->bd", state, c[:, t, :]))
        return torch.stack(outputs, dim=1) + x * self.D.float()


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.norm = MambaBlock(), RMSNorm(HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(self.norm(x)) + x


class Mamba(nn.Module):
    """forward(input_ids) returns logits; the head is the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([ResidualBlock() for _ in range(LAYERS)])
        self.norm_f = RMSNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm_f(x))

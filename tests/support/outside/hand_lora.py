"""Like minLoRA and its kin: frozen linears with a low-rank path, put in after construction."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen linear and a trained low-rank path beside it."""

    def __init__(self, linear: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, linear.in_features) * 0.02)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + (x @ self.lora_A.T) @ self.lora_B.T * self.scaling


def add_lora(model: nn.Module, *names: str) -> nn.Module:
    """Freeze `model` and replace its linears of these last names; returns it."""
    model.requires_grad_(False)
    found = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in names]
    for path, linear in found:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LoRALinear(linear))
    return model

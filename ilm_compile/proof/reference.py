"""The reference: one training step of the untransformed model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ilm_compile.program.trace import call_model
from ilm_compile.proof.emulate import Step, clip_coefficient
from ilm_compile.proof.emulated_rank import optimizer_of


def single_device_step(model: nn.Module, batch: Mapping[str, Tensor]) -> Step:
    """Return one step of `model` on the whole `batch`; its weights are put back afterwards."""
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = call_model(model, batch)["loss"]
    torch.autograd.backward(loss)
    used = {n: p for n, p in model.named_parameters() if p.grad is not None}
    gradients = {n: p.grad.clone() for n, p in used.items() if p.grad is not None}
    scale = clip_coefficient(gradients)
    for name, parameter in used.items():
        parameter.grad = gradients[name] * scale
    optimizer_of(used.items()).step()
    weights = {name: p.detach().clone() for name, p in used.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(original[name])
    model.zero_grad()
    return Step(loss.detach(), gradients, weights)

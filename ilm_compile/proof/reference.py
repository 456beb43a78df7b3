"""The reference: one training step of the untransformed model, and a batch to take it on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ilm_compile.program.program import Input, Program
from ilm_compile.program.trace import LossFn, call_model
from ilm_compile.proof.emulate import Step, clip_coefficient
from ilm_compile.proof.emulated_rank import optimizer_of

ROWS = 2  # of a micro-batch
TOKENS = 16
IGNORED = -100


def single_device_step(
    model: nn.Module, batch: Mapping[str, Tensor], loss_fn: LossFn | None = None
) -> Step:
    """Return one step of `model` on the whole `batch`; its weights are put back afterwards."""
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = call_model(model, batch, loss_fn)["loss"]
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


def small_inputs(inputs: Mapping[str, Input], tp: int) -> dict[str, Input]:
    """Return the shapes of a small micro-batch: few rows, and few tokens where there are many.

    Every dimension after the first that has the length of the longest input is a token dimension.
    """
    length = max(size for i in inputs.values() for size in (*i.shape[1:], 1))
    short = min(length, max(TOKENS, 2 * tp))
    return {
        name: Input((ROWS, *(short if n == length else n for n in i.shape[1:])), i.dtype)
        for name, i in inputs.items()
    }


def random_batch(inputs: Mapping[str, Input], count: int, vocab_size: int) -> dict[str, Tensor]:
    """Return `count` micro-batches of random data, with very unequal numbers of targets."""
    generator = torch.Generator().manual_seed(0)
    batch = {}
    for name, spec in inputs.items():
        shape = (spec.shape[0] * count, *spec.shape[1:])
        if spec.dtype.is_floating_point:
            batch[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        elif name == "cu_seqlens":
            batch[name] = _boundaries(shape, inputs, spec.dtype)
        elif name == "attention_mask":
            batch[name] = torch.ones(shape, dtype=spec.dtype)
        elif name == "position_ids":
            batch[name] = torch.arange(shape[-1]).expand(shape).to(spec.dtype).contiguous()
        else:
            batch[name] = torch.randint(0, vocab_size, shape, generator=generator, dtype=spec.dtype)
        if name == "labels" and len(shape) > 1:
            for row in range(shape[0]):
                batch[name][row, : (5 * row) % (shape[1] - 1)] = IGNORED
    return batch


def complete_inputs(program: Program, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `values` with ones for what the compiler added: numbers of targets, dropout seeds."""
    specs = {str(n.target): n.meta["val"] for n in program.graph.find_nodes(op="placeholder")}
    added = {n: torch.ones(s.shape, dtype=s.dtype) for n, s in specs.items() if n not in values}
    return {**values, **added}


def _boundaries(shape: tuple[int, ...], inputs: Mapping[str, Input], dtype: torch.dtype) -> Tensor:
    """Return document boundaries: two documents in each row, the second one longer."""
    length = max(i.shape[1] for n, i in inputs.items() if n != "cu_seqlens" and len(i.shape) > 1)
    row = [0, length // 3, *([length] * (shape[1] - 2))]
    return torch.tensor(row, dtype=dtype).expand(shape).contiguous()

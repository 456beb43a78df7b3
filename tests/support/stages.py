"""Runs a lowered program in this process, stage after stage, the way a pipeline would."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ilm_compile.program.lowered import LoweredProgram, Stage


def model_loss_and_grads(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the ordinary model on `batch`, and the gradient of each parameter."""
    model.zero_grad()
    output: Any = model(**batch)
    loss = output if isinstance(output, Tensor) else output["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def staged_outputs_and_grads(
    lowered: LoweredProgram, model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outputs of the last stage by name, and the gradients, with the weights of `model`.

    Every boundary is cut as it is between processes: what is sent arrives as a leaf, and must get
    a gradient exactly when its boundary says so.
    """
    inputs = dict(batch)
    for name, count in lowered.target_counts.items():
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        inputs[name] = count.graph(*(batch[key] for key in count.inputs)).to(dtype)
    for stage in lowered.stages:
        materialize_(stage, model)
    runs: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    received: tuple[Tensor, ...] = ()
    for stage in lowered.stages:
        results = stage.module(*(inputs[name] for name in stage.batch_inputs), *received)
        runs.append((received, results))
        sent = zip(results, stage.sent, strict=False)
        received = tuple(v.detach().requires_grad_(b.requires_grad) for v, b in sent)
        for value, boundary in zip(received, stage.sent, strict=True):
            assert (tuple(value.shape), value.dtype) == (boundary.shape, boundary.dtype)
    outputs = dict(zip(lowered.stages[-1].outputs, runs[-1][1], strict=True))
    _backward(lowered, runs)
    return {name: value.detach() for name, value in outputs.items()}, _gradients(lowered)


def materialize_(stage: Stage, model: nn.Module) -> None:
    """Give the meta tensors of a stage the values of the ordinary model."""
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, path in stage.variables.items():
        owner, _, leaf = path.rpartition(".")
        module = stage.module.get_submodule(owner)
        old = getattr(module, leaf)
        if not old.is_meta:
            continue
        assert (old.shape, old.dtype) == (values[name].shape, values[name].dtype)
        new = values[name].detach().clone()
        is_parameter = isinstance(old, nn.Parameter)
        setattr(module, leaf, nn.Parameter(new, old.requires_grad) if is_parameter else new)


def _backward(lowered: LoweredProgram, runs: list[tuple[tuple[Tensor, ...], ...]]) -> None:
    loss = runs[-1][1][0]
    pairs = [(loss, torch.ones_like(loss))]
    for stage, (received, _) in zip(reversed(lowered.stages), reversed(runs), strict=True):
        tensors, grads = zip(*pairs, strict=True)
        torch.autograd.backward(tensors, grads)
        if stage.index == 0:
            break
        pairs = []
        for value, boundary, sent in zip(
            received, stage.received, runs[stage.index - 1][1], strict=True
        ):
            assert (value.grad is not None) == boundary.requires_grad, boundary
            if value.grad is not None:
                pairs.append((sent, value.grad))


def _gradients(lowered: LoweredProgram) -> dict[str, Tensor]:
    grads: dict[str, Tensor] = {}
    for stage in lowered.stages:
        for name, path in stage.variables.items():
            grad = stage.module.get_parameter(path).grad if _is_parameter(stage, path) else None
            if grad is not None:
                grads[name] = grads[name] + grad if name in grads else grad
    return grads


def _is_parameter(stage: Stage, path: str) -> bool:
    return path in dict(stage.module.named_parameters())

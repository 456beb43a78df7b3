"""Training steps of the traced graph on one device, written plainly: what a plan must reproduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ilm_compile.program.copy import copy_program
from ilm_compile.program.dropout import SEED, seeded_dropout
from ilm_compile.program.kept_hooks import GradientHook
from ilm_compile.program.program import Program
from ilm_compile.proof.emulate import Step, clip_coefficient
from ilm_compile.proof.emulated_rank import optimizer_of
from ilm_compile.proof.promote import float64_default
from ilm_compile.runtime.batch import BatchLayout
from ilm_compile.runtime.mesh import Axis


def graph_steps(
    traced: Program,
    tensors: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    num_slices: int,
    max_norm: float | None = 1.0,
) -> list[Step]:
    """Return an optimizer step of `traced` for each global batch of `num_slices` micro-batches.

    tensors: what parameters and buffers start from; they are left as they are.
    """
    held: dict[str, Any] = {}
    for name, variable in traced.variables.items():
        if name in tensors:
            value = tensors[name].detach().clone()
            is_trained = variable.is_parameter and variable.requires_grad
            held[name] = torch.nn.Parameter(value) if is_trained else value
    trained = {n: t for n, t in held.items() if isinstance(t, torch.nn.Parameter)}
    optimizer = optimizer_of(trained.items()) if trained else None
    steps = []
    for number, batch in enumerate(batches):
        with float64_default():
            loss, outputs = _accumulate(traced, held, batch, num_slices, number)
        for name, parameter in trained.items():
            _run_hooks(traced.variables[name].gradient_hooks, parameter)
        gradients = {n: t.grad.clone() for n, t in trained.items() if t.grad is not None}
        _clip(trained, max_norm)
        if optimizer is not None:
            optimizer.step()
        for parameter in trained.values():
            parameter.grad = None
        weights = {
            name: held[name].detach().clone()
            for name, variable in traced.variables.items()
            if variable.is_parameter and name in held
        }
        steps.append(Step(loss, gradients, weights, outputs))
    return steps


def _accumulate(
    traced: Program, held: dict[str, Any], batch: Mapping[str, Tensor], num_slices: int, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up the gradients of all micro-batches; return the mean loss and the other outputs."""
    layout = BatchLayout(traced.inputs, num_slices, Axis())
    inputs = layout.split(batch, traced.inputs, torch.device("cpu"))
    for name, count in traced.target_counts.items():
        parts = [count.graph(*(inputs[i][m] for i in count.inputs)) for m in range(num_slices)]
        total = torch.stack(parts).sum(0)
        if count.weight or total.is_floating_point():
            total = total.double() * float(num_slices) ** count.weight
        inputs[name] = [total] * num_slices
    inputs[SEED] = layout.dropout_seeds(traced.plan.seed, step)
    names = [str(node.target) for node in traced.graph.find_nodes(op="placeholder")]
    losses, outputs = [], []
    for m in range(num_slices):
        runner = _Runner(traced.graph_module, held)
        loss, *others = runner.run(*(inputs[name][m] for name in names))
        (loss / num_slices).backward()
        losses.append(loss.detach())
        outputs.append([other.detach() for other in others])
    whole = {
        name: torch.cat([each[i] if each[i].dim() else each[i][None] for each in outputs])
        for i, name in enumerate(traced.output_names[1:])
    }
    return torch.stack(losses).mean(), whole


def _run_hooks(hooks: Sequence[GradientHook], parameter: torch.nn.Parameter) -> None:
    """As torch would after one backward of the whole batch."""
    with torch.no_grad():
        for hook in hooks if parameter.grad is not None else ():
            if hook.is_post:
                hook.function(parameter)
            elif (changed := hook.function(parameter.grad)) is not None:
                parameter.grad = changed
    if parameter.grad is not None:
        parameter.grad = parameter.grad.contiguous()


def _clip(parameters: Mapping[str, Tensor], max_norm: float | None) -> None:
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    factor = clip_coefficient(gradients, max_norm)
    for gradient in gradients.values():
        gradient.mul_(factor)


class _Runner(fx.Interpreter):
    """Runs a graph with the held tensors; constants of the graph bring their values along."""

    def __init__(self, module: fx.GraphModule, held: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.held = held

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.held[target] if target in self.held else super().get_attr(target, args, kwargs)


def without_dropout(program: Program) -> Program:
    """Return a copy of `program` in which nothing is dropped; itself if nothing was."""
    found = program.graph.find_nodes(op="call_function", target=seeded_dropout)
    if not found:
        return program
    result = copy_program(program)
    for node in result.graph.find_nodes(op="call_function", target=seeded_dropout):
        node.replace_all_uses_with(node.all_input_nodes[0])
    result.finish()
    for node in result.graph.find_nodes(op="placeholder"):
        if node.target == SEED:
            result.graph.erase_node(node)
    result.finish()
    return result

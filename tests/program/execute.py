"""Runs a program's graph with the weights of the model it was traced from, beside the model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace

Result = tuple[dict[str, Tensor], dict[str, Tensor]]
FEATURES = 6


class Apply(nn.Module):
    """A linear layer, then any function of itself and the layer's output, then a sum; float64."""

    def __init__(self, function: Callable[["Apply", Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES, dtype=torch.float64)
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, FEATURES, dtype=torch.float64))
        self.function = function

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        value = self.function(self, self.linear(x))
        return {"loss": value.sum(), "value": value}

    def example_inputs(self) -> dict[str, Tensor]:
        """Four rows."""
        generator = torch.Generator().manual_seed(0)
        return {"x": torch.randn(4, FEATURES, dtype=torch.float64, generator=generator)}


def run_program(program: Program, model: nn.Module, batch: Mapping[str, Tensor]) -> Result:
    """Outputs by name, and the gradient of each parameter that has one, in one micro-batch."""
    module = program.graph_module
    inputs = dict(batch)
    for name, count in program.target_counts.items():
        inputs[name] = count.graph(*(batch[key] for key in count.inputs)).double()
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    used = {name: parameters[name] for name, _ in module.named_parameters()}
    used |= {name: buffers[name] for name, value in module.named_buffers() if value.is_meta}
    arguments = [inputs[str(n.target)] for n in program.graph.find_nodes(op="placeholder")]
    values = functional_call(module, used, tuple(arguments))
    outputs = dict(zip(program.output_names, values, strict=True))
    return outputs, _gradients(outputs["loss"], model)


def run_model(
    model: nn.Module, batch: Mapping[str, Tensor], loss_fn: Callable[..., Tensor] | None = None
) -> Result:
    """The same, of the model itself."""
    arguments: dict[str, Any] = dict(batch)
    labels = arguments.pop("labels") if loss_fn else None
    if hasattr(model, "generate"):
        arguments["use_cache"] = False
    result = model(**arguments)
    if loss_fn is not None:
        result = loss_fn(result, labels)
    outputs = {"loss": result} if isinstance(result, Tensor) else dict(result)
    return outputs, _gradients(outputs["loss"], model)


def _gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, grads, strict=True) if g is not None}


def assert_same(got: Result, expected: Result) -> None:
    """Equal outputs, as far as the model names them, and the same parameters' equal gradients."""
    assert got[0].keys() >= expected[0].keys()
    assert got[1].keys() == expected[1].keys()
    for results, references in zip(got, expected, strict=True):
        for name, reference in references.items():
            torch.testing.assert_close(results[name], reference, rtol=1e-10, atol=1e-14, msg=name)


def trace_and_compare(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> Program:
    """Trace `model`; its program must give the model's outputs and gradients."""
    program = trace(model, example_inputs=batch, **options)
    expected = run_model(model, batch, options.get("loss_fn"))
    assert_same(run_program(program, model, batch), expected)
    return program

"""How a model is called in training: what goes in by name, and the loss and tensors that come out.

The capture and the proof call it alike.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ilm_compile.errors import TraceError
from ilm_compile.program.program import Input

Example = Tensor | tuple[tuple[int, ...], torch.dtype] | bool | int | float | str | None
ExampleInputs = Mapping[str, Example]
LossFn = Callable[[Any, Tensor], Tensor]
_USE_CACHE = "use_cache"


def call_model(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    loss_fn: LossFn | None = None,
    arguments: Mapping[str, Any] | None = None,
    tell: Callable[[str], object] = str,
) -> dict[str, Tensor]:
    """Return the tensors that `model` gives for `inputs` by name, the loss first.

    `arguments`: further arguments of its forward, which are no tensors. tell: given what was
    decided, in words. Raises `TraceError` if there is no scalar loss among the outputs.
    """
    call: dict[str, Any] = {**inputs, **(arguments or {})}
    labels = call.pop("labels") if loss_fn else None
    # A key-value cache is state for generation: it would be a second output of every layer.
    if _takes_cache(model):
        call.setdefault(_USE_CACHE, False)
    result = model(**call)
    if loss_fn is not None:
        result = {"loss": loss_fn(result, cast(Tensor, labels))}
    return _named_outputs(result, type(model).__name__, tell)


def _takes_cache(model: nn.Module) -> bool:
    return _USE_CACHE in inspect.signature(model.forward).parameters


def _named_outputs(result: Any, model: str, tell: Callable[[str], object]) -> dict[str, Tensor]:
    named = _by_name(result)
    if "loss" not in named and isinstance(loss := getattr(result, "loss", None), Tensor):
        named["loss"] = loss  # a property, of a dataclass too
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    losses = ["loss"] if "loss" in tensors else [n for n, t in tensors.items() if _is_loss(t)]
    if len(losses) != 1 or tensors[losses[0]].dim() != 0:
        raise TraceError(_no_loss(tensors, losses, model))
    (name,) = losses
    if name != "loss":
        tell(f"trace: {name} of {model} is the loss, its one scalar output that can be trained")
    return {"loss": tensors.pop(name), **tensors}


def _is_loss(value: Any) -> bool:
    is_scalar = isinstance(value, Tensor) and value.dim() == 0
    return is_scalar and value.is_floating_point() and value.requires_grad


def _no_loss(tensors: Mapping[str, Tensor], losses: list[str], model: str) -> str:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(losses) > 1:
        return (
            f"trace: expected one scalar that can be trained among the outputs of {model}, got "
            f"{', '.join(losses)} of outputs {shapes}; return the loss under the name 'loss' or as "
            f"the first output, in a sub-class of {model} if its file is not yours"
        )
    return (
        "trace: expected the model to return a scalar loss when given labels, or loss_fn to return "
        f"one, got outputs {shapes}; give what makes the model compute its loss (labels, targets) "
        "among the example_inputs, or both labels there and loss_fn=lambda outputs, labels: ..."
    )


def _by_name(result: Any) -> dict[str, Any]:
    if isinstance(result, Tensor):
        return {"loss": result}
    if isinstance(result, Mapping):
        return dict(result)
    if hasattr(result, "_asdict"):  # a namedtuple
        return dict(result._asdict())
    if dataclasses.is_dataclass(result):
        return {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    if hasattr(result, "loss"):
        return dict(getattr(result, "__dict__", {}))
    values = result if isinstance(result, (tuple, list)) else [result]
    named = {f"output_{i}": value for i, value in enumerate(values)}
    first, *others = values or [None]
    is_scalar = isinstance(first, Tensor) and first.dim() == 0
    if is_scalar and (_is_loss(first) or not any(map(_is_loss, others))):
        named = {"loss": named.pop("output_0"), **named}
    return named


def read_inputs(
    model: nn.Module, example_inputs: ExampleInputs | None
) -> tuple[dict[str, Input], dict[str, Any]]:
    """Return the tensor inputs of a micro-batch, and the arguments that are the same for each.

    Raises `TraceError` if there are none, or if they do not agree on the size of a micro-batch.
    """
    if example_inputs is None:
        if not hasattr(model, "example_inputs"):
            raise TraceError(
                f"trace: {type(model).__name__} has no example_inputs(); pass example_inputs="
                "{'input_ids': ((micro_batch, seq), torch.int64), 'labels': (...)}"
            )
        example_inputs = cast(ExampleInputs, model.example_inputs())  # type: ignore[operator]
    inputs: dict[str, Input] = {}
    arguments: dict[str, Any] = {}
    for name, value in example_inputs.items():
        if isinstance(value, Tensor):
            inputs[name] = Input(tuple(value.shape), value.dtype)
        elif isinstance(value, tuple):
            inputs[name] = Input(tuple(value[0]), value[1])
        else:
            arguments[name] = value
    batch = {name: i.shape[0] if i.shape else None for name, i in inputs.items()}
    if len(set(batch.values())) != 1 or None in batch.values():
        raise TraceError(
            "trace: dimension 0 of every example input must be the micro-batch size, got "
            f"{ {name: i.shape for name, i in inputs.items()} }"
        )
    return inputs, arguments


def packing_warning(
    model: nn.Module, inputs: Mapping[str, Input], arguments: Mapping[str, Any]
) -> str | None:
    """Return what to tell a user whose position_ids may or may not keep documents apart."""
    chosen = _USE_CACHE in arguments or not _takes_cache(model)
    if chosen or "position_ids" not in inputs or "attention_mask" in inputs:
        return None
    return (
        "position_ids are given and no attention_mask: the model is called with use_cache=False, "
        "under which Hugging Face models let a token attend within its own document only (a "
        "position that starts anew begins one). With use_cache=True they attend across documents. "
        "Put 'use_cache': False or True among the example_inputs to choose"
    )

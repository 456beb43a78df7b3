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
) -> dict[str, Tensor]:
    """Return the tensors that `model` gives for `inputs` by name, the loss first.

    `arguments`: further arguments of its forward, which are no tensors. Raises `TraceError` if
    there is no scalar loss among the outputs.
    """
    call: dict[str, Any] = {**inputs, **(arguments or {})}
    labels = call.pop("labels") if loss_fn else None
    # A key-value cache is state for generation: it would be a second output of every layer.
    if _takes_cache(model):
        call.setdefault(_USE_CACHE, False)
    result = model(**call)
    if loss_fn is not None:
        result = {"loss": loss_fn(result, cast(Tensor, labels))}
    return _named_outputs(result)


def _takes_cache(model: nn.Module) -> bool:
    return _USE_CACHE in inspect.signature(model.forward).parameters


def _named_outputs(result: Any) -> dict[str, Tensor]:
    named = _by_name(result)
    if "loss" not in named and isinstance(loss := getattr(result, "loss", None), Tensor):
        named["loss"] = loss  # a property, of a dataclass too
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    loss = tensors.pop("loss", None)
    if loss is None or loss.dim() != 0:
        shapes = {name: tuple(t.shape) for name, t in named.items() if isinstance(t, Tensor)}
        raise TraceError(
            "trace: expected the model to return a scalar loss when given labels, or loss_fn to "
            f"return one, got outputs {shapes}; "
            "pass loss_fn=lambda outputs, labels: ..., or labels among the example_inputs"
        )
    return {"loss": loss, **tensors}


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
    return {"loss" if i == 0 else f"output_{i}": value for i, value in enumerate(values)}


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

"""The user's own model run in float64, to be compared with the graph that was traced from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ilm_compile.program.borrow import remember
from ilm_compile.program.calling import LossFn, call_model
from ilm_compile.program.gradient_hooks import OF_PARAMETER
from ilm_compile.proof.emulate import Step
from ilm_compile.proof.promote import float64_throughout


def model_step(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    *,
    loss_fn: LossFn | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Step:
    """Return loss, gradients and outputs of `model` on the whole `batch` in one piece.

    tensors: float64 values for its parameters and buffers, by their first names. Nothing is
    dropped. The model is left as it was.
    """
    with _lent(model, tensors) as parameters, float64_throughout():
        named = call_model(model, batch, loss_fn, arguments)
        loss = named.pop("loss")
        if loss.requires_grad:
            torch.autograd.backward(loss)
    gradients = {n: p.grad.to_dense() for n, p in parameters.items() if p.grad is not None}
    outputs = {name: value.detach() for name, value in named.items()}
    return Step(loss.detach(), gradients, {}, outputs)


@contextmanager
def _lent(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Put `tensors` in the place of the model's own while this runs, and drop nothing."""
    put_back = remember(model)
    replaced: dict[int, Tensor] = {}
    parameters: dict[str, Tensor] = {}
    try:
        if not model.training:
            model.train()
        for path, module in model.named_modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for leaf, own in table.items():
                    if own is None:
                        continue
                    name = f"{path}.{leaf}".lstrip(".")
                    if id(own) not in replaced:
                        replaced[id(own)] = _stand_in(own, tensors.get(name))
                        if isinstance(own, nn.Parameter):
                            parameters[name] = replaced[id(own)]
                    table[leaf] = replaced[id(own)]
        with _Exchange(replaced), _NoDropout():
            yield parameters
    finally:
        for undo in put_back:
            undo()


def _stand_in(own: Tensor, value: Tensor | None) -> Tensor:
    if value is None:  # nothing in the graph uses it
        value = torch.zeros(own.shape, dtype=own.dtype)
    value = value.detach().clone()
    if not isinstance(own, nn.Parameter):
        return value
    parameter = nn.Parameter(value, requires_grad=own.requires_grad)
    parameter.__dict__.update(vars(own))
    for attribute, kind in OF_PARAMETER.items():  # torch itself says what they do
        for hook in (getattr(own, attribute, None) or {}).values():
            getattr(parameter, kind)(hook)
    return parameter


class _Exchange(TorchFunctionMode):
    """Takes the stand-in where a model uses a tensor that it kept in a list or a closure."""

    def __init__(self, replaced: dict[int, Tensor]) -> None:
        super().__init__()
        self.replaced = replaced

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_map_only(Tensor, self._exchange, (args, kwargs or {}))
        return func(*given[0], **given[1])

    def _exchange(self, tensor: Tensor) -> Tensor:
        return self.replaced.get(id(tensor), tensor)


_DROPOUTS = {F.dropout, torch.dropout, F.dropout1d, F.dropout2d, F.dropout3d}


class _NoDropout(TorchFunctionMode):
    """Drops nothing, whatever the probability."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs.pop("dropout_p", None)
        return func(*args, **kwargs)

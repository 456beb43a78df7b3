"""Capture: an ordinary model, traced with its loss into one `Program`.

torch.export (non-strict, on fake tensors) gives an ATen graph in which parameters are placeholders;
`ilm_compile.program.normalize` rewrites that graph into the project's one dialect. Nothing is
computed and no weight is copied, so a model on the meta device is as good as a real one.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ilm_compile.errors import TraceError
from ilm_compile.program.causal import fold_causal_masks
from ilm_compile.program.constants import KeepConstants
from ilm_compile.program.custom_functions import checked_functions
from ilm_compile.program.functional import functionalize
from ilm_compile.program.loss import normalize_loss
from ilm_compile.program.normalize import is_users_file, normalize
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Input, Program, Variable
from ilm_compile.program.regions import find_regions

ExampleInputs = Mapping[str, Tensor | tuple[tuple[int, ...], torch.dtype]]
LossFn = Callable[[Any, Tensor], Tensor]


def trace(
    model: nn.Module,
    *,
    example_inputs: ExampleInputs | None = None,
    loss_fn: LossFn | None = None,
    plan: Plan | None = None,
) -> Program:
    """Return the program of one micro-batch of `model`, forward pass and loss.

    `example_inputs` gives each forward argument of ONE micro-batch as a tensor or as (shape,
    dtype); None asks ``model.example_inputs()``. With a `loss_fn`, the program computes
    ``loss_fn(model(**inputs without labels), labels)``; without one the model must return its loss
    when it is given ``labels``: as a scalar, as ``.loss`` or as the first output. Raises
    `TraceError` when the model cannot be captured as one static graph.
    """
    inputs = _read_inputs(model, example_inputs)
    if loss_fn is not None and "labels" not in inputs:
        raise TraceError(
            f"trace: expected labels among the example_inputs, got {list(inputs)}; "
            "loss_fn(outputs, labels) takes them"
        )
    recorded: list[list[str]] = []
    wrapper = _WithLoss(_on_meta(model).train(), loss_fn, recorded.append)
    fakes = {name: torch.empty(i.shape, dtype=i.dtype, device="meta") for name, i in inputs.items()}
    variables = _read_variables(model)
    try:
        with KeepConstants(), checked_functions():
            exported = functionalize(torch.export.export(wrapper, (fakes,), strict=False))
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(_explain(model, error)) from error
    graph_module, output_names = normalize(exported, variables, list(inputs), recorded[-1])
    program = Program(
        graph_module=graph_module,
        plan=plan or Plan(),
        inputs=inputs,
        variables=variables,
        regions=[],
        target_counts={},
        output_names=output_names,
        initializer=getattr(model, "initial_parameter", None),
    )
    normalize_loss(program)
    fold_causal_masks(program)
    find_regions(program)
    program.finish()
    program.facts.add("traced")
    return program


class _WithLoss(nn.Module):
    """Calls the model and puts the loss first among its outputs, dropping what is not a tensor."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn | None, record: Callable[[list[str]], None]
    ) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn
        self.record = record  # told the names of the outputs; export undoes changes of attributes

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        named = call_model(self.model, inputs, self.loss_fn)
        self.record(list(named))
        return tuple(named.values())


def call_model(
    model: nn.Module, inputs: Mapping[str, Tensor], loss_fn: LossFn | None = None
) -> dict[str, Tensor]:
    """Return the tensors that `model` gives for `inputs` by name, the loss first.

    Raises `TraceError` if there is no scalar loss among them.
    """
    arguments: dict[str, Any] = dict(inputs)
    labels = arguments.pop("labels") if loss_fn else None
    # A key-value cache is state for generation: it would be a second output of every layer.
    if "use_cache" in inspect.signature(model.forward).parameters:
        arguments["use_cache"] = False
    result = model(**arguments)
    if loss_fn is not None:
        result = {"loss": loss_fn(result, cast(Tensor, labels))}
    return _named_outputs(result)


def _named_outputs(result: Any) -> dict[str, Tensor]:
    if isinstance(result, Tensor):
        named: dict[str, Any] = {"loss": result}
    elif isinstance(result, Mapping):
        named = dict(result)
    else:
        named = {"loss" if i == 0 else f"output_{i}": value for i, value in enumerate(result)}
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


def _read_inputs(model: nn.Module, example_inputs: ExampleInputs | None) -> dict[str, Input]:
    if example_inputs is None:
        if not hasattr(model, "example_inputs"):
            raise TraceError(
                f"trace: {type(model).__name__} has no example_inputs(); pass example_inputs="
                "{'input_ids': ((micro_batch, seq), torch.int64), 'labels': (...)}"
            )
        example_inputs = cast(ExampleInputs, model.example_inputs())  # type: ignore[operator]
    inputs = {
        name: Input(tuple(v.shape), v.dtype) if isinstance(v, Tensor) else Input(tuple(v[0]), v[1])
        for name, v in example_inputs.items()
    }
    batch = {name: i.shape[0] if i.shape else None for name, i in inputs.items()}
    if len(set(batch.values())) != 1 or None in batch.values():
        raise TraceError(
            "trace: dimension 0 of every example input must be the micro-batch size, got "
            f"{ {name: i.shape for name, i in inputs.items()} }"
        )
    return inputs


def _read_variables(model: nn.Module) -> dict[str, Variable]:
    """Return parameters and buffers by their first name; further names are aliases."""
    first: dict[int, str] = {}
    variables: dict[str, Variable] = {}
    persistent = set(model.state_dict(keep_vars=True))
    named = [
        *((n, t, True) for n, t in model.named_parameters(remove_duplicate=False)),
        *((n, t, False) for n, t in model.named_buffers(remove_duplicate=False)),
    ]
    for name, tensor, is_parameter in named:
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            variables[owner].aliases += (name,)
            continue
        variables[name] = Variable(
            name=name,
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            is_parameter=is_parameter,
            requires_grad=tensor.requires_grad,
            persistent=name in persistent,
        )
    return variables


def _on_meta(module: nn.Module) -> nn.Module:
    """Return a structural copy of `module` whose tensors are all on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(meta, requires_grad=tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else meta
        )
    return copy.deepcopy(module, memo)


_IN_PLAIN_WORDS = {
    "fake tensor in the exported program constant's list": (
        "its forward reads or changes the .data of a parameter, or holds a tensor made elsewhere"
    ),
}


def _explain(model: nn.Module, error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    first = next((words for part, words in _IN_PLAIN_WORDS.items() if part in first), first)
    where = _user_frame(error)
    return (
        f"trace: {type(model).__name__} cannot be captured as one static graph{where}: "
        f"{first.strip()}\ntorch.export follows shapes, not values: branch on shapes or "
        "configuration only, and replace `if tensor:` and tensor.item() by torch.where or "
        "arithmetic. torch.export's full reason is chained to this error."
    )


def _user_frame(error: BaseException) -> str:
    """Return the innermost line outside torch that the error passed through."""
    seen: BaseException | None = error
    frames: list[traceback.FrameSummary] = []
    while seen is not None:
        frames += traceback.extract_tb(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    outside = [f for f in frames if is_users_file(f.filename)]
    user = [f for f in outside if f.name == "forward"] or outside
    return f" (at {user[-1].filename}:{user[-1].lineno}: {user[-1].line})" if user else ""

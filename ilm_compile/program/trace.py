"""Capture: an ordinary model, traced with its loss into one `Program`.

torch.export (non-strict, on fake tensors of the model's own device) gives an ATen graph in which
parameters are placeholders; `ilm_compile.program.normalize` rewrites it into the project's one
dialect. Nothing is computed and nothing copied, so a model on the meta device is as good as a real
one, and the user's model is afterwards what it was (`ilm_compile.program.borrow`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.traceback import preserve_node_meta
from torch.overrides import TorchFunctionMode

from ilm_compile.errors import TraceError
from ilm_compile.program.borrow import Loan, Originals, borrowed, refuse_lazy
from ilm_compile.program.calling import ExampleInputs as ExampleInputs
from ilm_compile.program.calling import LossFn as LossFn
from ilm_compile.program.calling import call_model as call_model
from ilm_compile.program.calling import packing_warning, read_inputs
from ilm_compile.program.causal import fold_causal_masks
from ilm_compile.program.constants import KeepConstants
from ilm_compile.program.custom_functions import kept_functions
from ilm_compile.program.first_items import first_items
from ilm_compile.program.functional import functionalize
from ilm_compile.program.gradient_hooks import (
    NoGradientHooks,
    kept_gradient_hooks,
    no_saved_tensor_hooks,
)
from ilm_compile.program.known import KnownValues
from ilm_compile.program.lifted import lifted_constants
from ilm_compile.program.loss import normalize_loss
from ilm_compile.program.normalize import normalize
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Input, Program, Variable
from ilm_compile.program.recurrent import UnrolledRecurrence
from ilm_compile.program.regions import find_regions
from ilm_compile.program.users_line import NotedLines, is_users_file


def trace(
    model: nn.Module,
    *,
    example_inputs: ExampleInputs | None = None,
    loss_fn: LossFn | None = None,
) -> Program:
    """Return the program of one micro-batch of `model`, forward pass and loss.

    `example_inputs` gives each forward argument of ONE micro-batch as a tensor or as (shape,
    dtype), and arguments that are no tensors (``"use_cache": True``) as they are; None asks
    ``model.example_inputs()``. With a `loss_fn`, the program computes
    ``loss_fn(model(**inputs without labels), labels)``; without one the model must return its loss
    when it is given ``labels`` or what it calls them: as a scalar, as ``.loss``, as the first
    output, or as the one scalar output that can be trained. Raises `TraceError` when the model
    cannot be captured as one static graph.

    Gradient hooks of parameters that work element by element are kept. They see the gradient of the
    whole global batch, where a loop that accumulates runs them in each backward.
    """
    inputs, arguments = read_inputs(model, example_inputs)
    if loss_fn is not None and "labels" not in inputs:
        raise TraceError(
            f"trace: expected labels among the example_inputs, got {list(inputs)}; "
            "loss_fn(outputs, labels) takes them"
        )
    refuse_lazy(model)
    hooks = kept_gradient_hooks(model)
    recorded: list[list[str]] = []
    decided: list[str] = []
    variables = _read_variables(model)
    for name, kept in hooks.items():
        variables[name].gradient_hooks = kept
    was_training = model.training
    with borrowed(model) as loan:
        known = KnownValues(loan)
        modes = (
            *(NotedLines(), Originals(loan), KeepConstants(), NoGradientHooks()),
            *(UnrolledRecurrence(), known),
        )
        wrapper = _WithLoss(loan, loss_fn, arguments, modes, recorded.append, decided.append)
        fakes = {name: loan.input(i.shape, i.dtype) for name, i in inputs.items()}
        try:
            # No code is made of the graphs on the way: nothing but the graph is looked at.
            with no_saved_tensor_hooks(), preserve_node_meta(), _use_lazy_graph_module(True):
                exported = torch.export.export(wrapper, (fakes,), strict=False)
            lifted_constants(exported)
            exported = functionalize(exported)
        except TraceError:
            raise
        except Exception as error:
            raise TraceError(_explain(model, error)) from error
    graph_module, output_names = normalize(exported, variables, list(inputs), recorded[-1])
    program = Program(
        graph_module=graph_module,
        plan=Plan(),
        inputs=inputs,
        variables=variables,
        regions=[],
        target_counts={},
        output_names=output_names,
        initializer=getattr(model, "initial_parameter", None),
        arguments=arguments,
        retrace=partial(_retrace, model, arguments, loss_fn),
    )
    program.decisions += dict.fromkeys(decided)
    program.warnings += [*known.decided, *loan.changed]
    if hooks:
        program.decisions.append(
            f"trace: the gradient hooks of {', '.join(hooks)} are kept; they see the gradient of "
            "the whole batch, once each time the schedule is executed, before clipping"
        )
    if packing := packing_warning(model, inputs, arguments):
        program.warnings.append(packing)
    if not was_training:
        program.decisions.append(
            "trace: the model was in evaluation mode and is traced in training mode, dropout on; a "
            "part alone that is in evaluation mode stays so"
        )
    normalize_loss(program)
    fold_causal_masks(program)
    find_regions(program)
    program.finish()
    program.facts.add("traced")
    return program


def _retrace(
    model: nn.Module,
    arguments: Mapping[str, Any],
    loss_fn: LossFn | None,
    inputs: Mapping[str, Input],
    blocks: Mapping[str, int] | None = None,
) -> Program:
    """As `Program.retrace`; blocks: how many of the first of a list of modules, by its path."""
    tensors = {name: (spec.shape, spec.dtype) for name, spec in inputs.items()}
    with first_items(model, blocks or {}):
        return trace(model, example_inputs={**tensors, **arguments}, loss_fn=loss_fn)


class _WithLoss(nn.Module):
    """Calls the model and puts the loss first among its outputs, dropping what is not a tensor."""

    def __init__(
        self,
        loan: Loan,
        loss_fn: LossFn | None,
        arguments: Mapping[str, Any],
        modes: Sequence[TorchFunctionMode],
        record: Callable[[list[str]], None],
        tell: Callable[[str], object],
    ) -> None:
        super().__init__()
        self.model = loan.model
        self.loan = loan
        # In a tuple: were it a module, its tensors would be taken for the model's.
        self.rest = (loss_fn, arguments)
        self.modes = modes  # that see each call of the user's, the last one first
        self.tell = tell
        self.record = record  # told the names of the outputs; export undoes changes of attributes

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        with ExitStack() as stack:
            stack.enter_context(self.loan.forward())
            for mode in self.modes:
                stack.enter_context(mode)
            terms = stack.enter_context(kept_functions())
            named = call_model(self.model, inputs, *self.rest, tell=self.tell)
        for term in terms:
            named["loss"] = named["loss"] + term
        self.record(list(named))
        return tuple(named.values())


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


_IN_PLAIN_WORDS = {
    "higher order operator": (
        "it calls higher-order control flow (torch.cond, while_loop), which is no ATen and no "
        "registered op"
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

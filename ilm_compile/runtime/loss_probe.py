"""Looks at what a program's cross entropy is given, wherever in graph and plan it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ilm_compile.errors import IlmCompileError
from ilm_compile.ops import spec_of
from ilm_compile.program.communicator import Communicator, communicator
from ilm_compile.program.layout import Layout, layout_of
from ilm_compile.program.linear_loss import linear_cross_entropy
from ilm_compile.program.loss import cross_entropy_arguments
from ilm_compile.program.lowered import Stage
from ilm_compile.program.token_metrics import TokenMetrics, token_metrics
from ilm_compile.runtime.agree import any_rank
from ilm_compile.runtime.materialize import graph_modules, recompile
from ilm_compile.runtime.parallel import Parallel

_WHOLE = torch.ops.aten.cross_entropy_loss.default

# Told of one micro-batch: the metrics, and whether each tp rank has tokens of its own.
Record = Callable[[TokenMetrics, Layout, torch.Size], None]


@contextmanager
def probe(parallel: Parallel, record: Record) -> Iterator[None]:
    """Have the first cross entropy of the program tell `record` of every micro-batch it sees."""
    stage = last_stage(parallel)
    found = None if stage is None else _find_loss(stage)
    if not any(any_rank([found is not None], parallel.mesh)):
        raise IlmCompileError(
            "evaluate: expected a model whose loss is a cross entropy of class numbers "
            "(torch.nn.functional.cross_entropy), found none in its graph; "
            "execute_schedule(batch, forward_only=True) gives the loss of any model"
        )
    if found is None:
        yield
        return
    graph_module, node = found
    target = node.target
    node.target = _observed(node, record)
    recompile(graph_module)
    try:
        yield
    finally:
        node.target = target
        recompile(graph_module)


def _find_loss(stage: Stage) -> tuple[fx.GraphModule, fx.Node] | None:
    for graph_module in graph_modules(stage.module):
        for node in graph_module.graph.nodes:
            if (place := spec_of(node.target).labels) is not None:
                target: Any = node.args[place]
                if not target.meta["val"].is_floating_point():
                    return graph_module, node
    return None


def _observed(node: fx.Node, record: Record) -> Callable[..., Tensor]:
    """The cross entropy of `node`, which also tells `record` what it was given."""
    original: Callable[..., Tensor] = node.target  # type: ignore[assignment]
    place = spec_of(original).labels
    assert place is not None
    comm: Communicator | None = None
    if original is _WHOLE:
        ignore_index = cross_entropy_arguments(node)[2]
    else:
        ignore_index = int(node.args[place + 2])  # type: ignore[arg-type]
        if axis := str(node.args[-1]):
            comm = communicator(axis)
    layout = layout_of(node.args[place])  # type: ignore[arg-type]

    def observed_cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
        x, target = args[0], args[place]
        logits = F.linear(x, args[1].to(x.dtype)) if original is linear_cross_entropy else x
        flat = logits.movedim(1, -1).flatten(0, -2)
        metrics = token_metrics(
            flat.detach(), target.flatten(), ignore_index=ignore_index, comm=comm
        )
        record(metrics, layout, target.shape)
        return original(*args, **kwargs)

    return observed_cross_entropy


def last_stage(parallel: Parallel) -> Stage | None:
    """The stage with the loss, None if another rank holds it."""
    return next((stage for stage in parallel.form.graphs if not stage.sent), None)

"""What the graphs do differently in training and evaluation, and for who wants their outputs.

A program is traced in training mode. Evaluation turns dropout off where it stands in the graph.
Logits that only an output needs are computed where it is asked for.
"""

from __future__ import annotations

from torch import nn

from ilm_compile.ops import spec_of
from ilm_compile.program.linear_loss import output_logits
from ilm_compile.runtime.materialize import graph_modules, recompile

_TRAINED_WITH = "trained_with"  # in node.meta: the argument as it was traced


def set_training(module: nn.Module, training: bool) -> None:
    """Switch every graph of `module` to training or to evaluation."""
    for graph_module in graph_modules(module):
        random = {
            n: found for n in graph_module.graph.nodes if (found := spec_of(n.target).probability)
        }
        for node, (position, name) in random.items():
            if position < len(node.args):
                traced = node.meta.setdefault(_TRAINED_WITH, node.args[position])
                node.update_arg(position, traced if training else 0.0)
            elif name in node.kwargs:
                traced = node.meta.setdefault(_TRAINED_WITH, node.kwargs[name])
                node.update_kwarg(name, traced if training else 0.0)
        if random:
            recompile(graph_module)


def set_outputs(module: nn.Module, wanted: bool) -> None:
    """Switch on or off what is computed in `module` for its outputs alone."""
    for graph_module in graph_modules(module):
        nodes = graph_module.graph.find_nodes(op="call_function", target=output_logits)
        for node in nodes:
            node.args = (*node.args[:2], wanted)
        if nodes:
            recompile(graph_module)

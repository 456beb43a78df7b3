"""What is done to the graphs that Inductor compiles, forward and backward, after its own passes.

The one place that knows how Inductor is given passes, which is no public interface of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from ilm_compile.program import collectives, started
from ilm_compile.runtime import overlap

OPTION = "post_grad_custom_post_pass"
_SUM, _COPY = torch.ops.aten.sum.dim_IntList, torch.ops.aten.clone.default


class GraphPasses(CustomGraphPass):
    """The passes, for Inductor's option `OPTION`."""

    def __call__(self, graph: fx.Graph) -> None:
        sum_once(graph)
        overlap.overlap(graph)

    def uuid(self) -> Any:
        """What Inductor's cache knows the passes by."""
        modules = (overlap, started, collectives)
        return get_hash_for_files((__file__, *(str(module.__file__) for module in modules)))


def sum_once(graph: fx.Graph) -> None:
    """Copy what is summed twice, as two biases' gradients may be that see the same rows.

    For bfloat16, Inductor of torch 2.13 writes C++ for the second that does not compile.
    """
    known: dict[object, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=_SUM):
        key = (node.args[0], str(node.args[1:]), str(node.kwargs))
        if (first := known.setdefault(key, node)) is not node:
            node.target, node.args, node.kwargs = _COPY, (first,), {}

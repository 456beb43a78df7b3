"""The shortest way from Python to an op: what a graph calls by overload, by torch's own binding.

`torch.ops.aten.mul.Tensor` boxes every argument by a schema; `torch.mul` parses them itself, 1 to 2
us faster. Both end in the same call of the dispatcher. A table, for a binding may take arguments in
another order or mean another overload.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

_NAMES: dict[Any, str] = {
    torch: """
        add.Tensor sub.Tensor mul.Tensor div.Tensor pow.Tensor_Scalar neg.default rsqrt.default
        tanh.default mean.dim matmul.default addmm.default layer_norm.default embedding.default
        cat.default reshape.default transpose.int permute.default unsqueeze.default select.int""",
    torch._C._nn: "linear.default silu.default gelu.default scaled_dot_product_attention.default",
    torch.Tensor: "expand.default to.dtype",
}
DIRECT: dict[Any, Any] = {
    getattr(getattr(torch.ops.aten, name), overload): getattr(owner, name)
    for owner, names in _NAMES.items()
    for name, overload in (each.split(".") for each in names.split())
}


@contextmanager
def direct_calls(graph: fx.Graph) -> Iterator[None]:
    """While code is made of `graph`, its calls are the bindings of `DIRECT`."""
    swapped = {node: node.target for node in graph.nodes if node.target in DIRECT}
    for node, target in swapped.items():
        node.target = DIRECT[target]
    try:
        yield
    finally:
        for node, target in swapped.items():
            node.target = target

"""The shortest way from Python to an op: what a graph calls by overload, by torch's own binding.

`torch.ops.aten.mul.Tensor` goes through the interpreter of schemas, which boxes every argument;
`torch.mul` parses them itself, at half of the host time. Both end in the same call of the
dispatcher. A table, for a binding may take arguments in another order or mean another overload:
tests/runtime/test_direct.py compares each on the samples of the sharding rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
DIRECT: dict[Any, Any] = {
    aten.add.Tensor: torch.add,
    aten.mul.Tensor: torch.mul,
    aten.sub.Tensor: torch.sub,
    aten.div.Tensor: torch.div,
    aten.neg.default: torch.neg,
    aten.rsqrt.default: torch.rsqrt,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.mean.dim: torch.mean,
    aten.tanh.default: torch.tanh,
    aten.matmul.default: torch.matmul,
    aten.addmm.default: torch.addmm,
    aten.linear.default: torch._C._nn.linear,
    aten.silu.default: torch._C._nn.silu,
    aten.gelu.default: torch._C._nn.gelu,
    aten.scaled_dot_product_attention.default: torch._C._nn.scaled_dot_product_attention,
    aten.layer_norm.default: torch.layer_norm,
    aten.embedding.default: torch.embedding,
    aten.cat.default: torch.cat,
    aten.reshape.default: torch.reshape,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.select.int: torch.select,
    aten.expand.default: torch.Tensor.expand,
    aten.to.dtype: torch.Tensor.to,
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

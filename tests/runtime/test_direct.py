"""Code of graphs calls torch's own bindings, which end in the same ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from ilm_compile.runtime.direct import DIRECT, direct_calls
from tests.sharding.samples import SAMPLES

aten = torch.ops.aten
FURTHER = {
    op: [lambda: ((torch.ones(2), 1e-6), {}), lambda: ((torch.ones(2), torch.arange(2) + 1), {})]
    for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
}


class Ops(TorchDispatchMode):
    """Notes what reaches the dispatcher's lowest layer."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", DIRECT, ids=str)
def test_a_binding_ends_in_the_same_ops(op: Any) -> None:
    for make in (*SAMPLES.get(op, ()), *FURTHER.get(op, ())):
        args, kwargs = make()
        results, ops = [], []
        for function in (op, DIRECT[op]):
            with Ops() as seen:
                results.append(function(*args, **kwargs))
            ops.append(seen.found)
        assert ops[0] == ops[1]
        torch.testing.assert_close(*results, rtol=0, atol=0)
    assert op in SAMPLES or op in FURTHER


def test_a_graph_keeps_its_overloads() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    product = graph.call_function(aten.mul.Tensor, (x, x))
    graph.output(graph.call_function(aten.cumsum.default, (product, 0)))
    with direct_calls(graph):
        module = fx.GraphModule(torch.nn.Module(), graph)
    assert "torch.mul(" in module.code
    assert "torch.ops.aten.cumsum.default(" in module.code
    assert [n.target for n in graph.nodes][1:3] == [aten.mul.Tensor, aten.cumsum.default]
    given = Tensor([1.0, 2.0])
    assert torch.equal(module(given), torch.tensor([1.0, 5.0]))

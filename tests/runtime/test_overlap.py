"""Collectives of a compiled region: what runs beside them, and what passes none of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ilm_compile.program.bound import bind, bind_axes
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.communicator import ShapeCommunicator, communicators
from ilm_compile.runtime import compiled
from ilm_compile.runtime.communicator import SingleCommunicator, communicator_over
from ilm_compile.runtime.graph_passes import GraphPasses
from tests.support.compiled import skip_without_inductor

aten, ilm = torch.ops.aten, torch.ops.ilm
WIDTH = 8


class Logged(SingleCommunicator):
    """One of two ranks that are alike; what it is asked for goes into `log`."""

    size = 2

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def all_gather(self, x: Tensor) -> Tensor:
        self.log.append("all_gather")
        return torch.stack([x, x])

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self.log.append("reduce_scatter")
        return 2 * x[0]

    def start(self, kind: str, x: Tensor) -> tuple[Tensor, Callable[[], None]]:
        result, _ = super().start(kind, x)
        kept = result.clone()
        result.fill_(torch.nan)  # nothing is there before it was waited for

        def wait() -> None:
            self.log.append("wait")
            result.copy_(kept)

        return result, wait


class Products(TorchDispatchMode):
    """Logs the products that run."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten.mm, aten.addmm):
            self.log.append("product")
        return func(*args, **(kwargs or {}))


def feed_forward() -> fx.GraphModule:
    """Two products of a block under sequence parallelism: gathered before, scattered after."""
    graph, root = fx.Graph(), nn.Module()
    torch.manual_seed(0)
    x = graph.placeholder("x")
    values = {"up": (WIDTH, 3 * WIDTH), "down": (3 * WIDTH, WIDTH)}
    for name, shape in values.items():
        setattr(root, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
    up, down = (graph.get_attr(name) for name in values)
    whole = graph.call_function(redistribute, (x, "S(0)", "R", "tp"))
    wide = graph.call_function(aten.mm.default, (whole, up))
    bent = graph.call_function(aten.tanh.default, (wide,))
    out = graph.call_function(aten.mm.default, (bent, down))
    graph.output((graph.call_function(redistribute, (out, "P", "S(0)", "tp")),))
    rows = torch.empty(4, WIDTH, dtype=torch.float64)
    x.meta["val"], up.meta["val"], down.meta["val"] = rows, root.up, root.down
    for node, shape in ((whole, (8, WIDTH)), (wide, (8, 24)), (bent, (8, 24)), (out, (8, WIDTH))):
        node.meta["val"] = rows.new_empty(shape)
    return fx.GraphModule(root, graph)


def trained(run: Callable[..., Any], module: fx.GraphModule, log: list[str]) -> list[Tensor | None]:
    """The result and all gradients; `log` has what ran, and where the backward began."""
    torch.manual_seed(1)
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    module.zero_grad()
    with Products(log):
        (y,) = run(module, x)
        log.append("backward")
        y.square().sum().backward()
    return [y.detach(), x.grad, module.up.grad, module.down.grad]


def test_gradients_of_weights_run_beside_the_collectives_of_a_backward() -> None:
    skip_without_inductor()
    module, log = feed_forward(), list[str]()
    bound = bind({"tp": Logged(log)})
    bind_axes(module, bound)
    module.recompile()
    written = type(module).forward
    expected = trained(written, module, [])
    run = compiled.RegionCompiler(compiled.INDUCTOR).code(module, "layers_0", written)
    trained(run, module, [])
    log.clear()
    for found, value in zip(trained(run, module, log), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)
    ahead, back = log[: log.index("backward")], log[log.index("backward") + 1 :]
    assert ahead == ["all_gather", "wait", "product", "product", "reduce_scatter", "wait"]
    sent = back.index("reduce_scatter")
    assert back[:3] == ["all_gather", "wait", "product"]
    assert back[sent:] == ["reduce_scatter", "product", "product", "wait"]  # both weights'


def graph_of(*calls: tuple[Any, ...]) -> list[str]:
    """What Inductor hands over: each call has a name, an op, and the names or values it takes."""
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    with FakeTensorMode(), communicators(tp=ShapeCommunicator(2)):
        nodes["x"] = graph.placeholder("x")
        nodes["x"].meta["val"] = torch.empty(WIDTH, WIDTH)
        for name, target, *args in calls:
            given = tuple(nodes.get(arg, arg) if isinstance(arg, str) else arg for arg in args)
            node = nodes[name] = graph.create_node("call_function", target, given, name=name)
            node.meta["val"] = target(*fx.node.map_arg(given, lambda each: each.meta["val"]))
        graph.output(tuple(node for node in nodes.values() if not node.users))
        GraphPasses()(graph)
    graph.lint()
    names = [node.name for node in graph.nodes if node.op == "call_function"]
    return [re.sub("_default(.*)", r"\1", name) for name in names]


MM, REDUCE = aten.mm.default, (ilm.redistribute.default, "P", "I", "tp", False)


def sent(name: str, x: str) -> tuple[Any, ...]:
    return (name, REDUCE[0], x, *REDUCE[1:])


def test_what_leads_to_a_collective_does_not_wait_for_a_later_one() -> None:
    order = graph_of(
        ("first", MM, "x", "x"),
        ("weight", MM, "first", "x"),
        sent("sum", "first"),
        ("second", MM, "sum", "x"),
        sent("sum2", "second"),
        ("last", aten.tanh.default, "sum2"),
    )
    expected = ["first", "start", "weight", "wait", "second", "start_1", "wait_1", "last"]
    assert order == expected


def test_independent_collectives_start_in_their_order_and_as_soon_as_they_can() -> None:
    order = graph_of(
        ("a", MM, "x", "x"),
        ("b", aten.tanh.default, "x"),
        ("c", aten.exp.default, "b"),
        sent("sum_b", "b"),
        sent("sum_a", "a"),
        ("both", aten.add.Tensor, "sum_a", "sum_b"),
        ("all", aten.add.Tensor, "both", "c"),
    )
    assert order.index("start") < order.index("start_1") < order.index("c")
    assert order.index("c") < min(order.index("wait"), order.index("wait_1"))


FENCES = {
    "a collective that is one op": ("fence", ilm.all_reduce.default, "x", "sum", "tp"),
    "a write": ("fence", aten.copy_.default, "first", "x"),
}


@pytest.mark.parametrize("fence", FENCES)
def test_nothing_passes(fence: str) -> None:
    order = graph_of(
        ("first", MM, "x", "x"),
        ("weight", MM, "first", "first"),
        FENCES[fence],
        sent("sum", "first"),
        ("end", aten.tanh.default, "sum"),
    )
    assert order == ["first", "weight", "fence", "start", "wait", "end"]


def test_what_several_collectives_make_stays_whole() -> None:
    move = (ilm.redistribute.default, "x", "S(0, segments=(4, 12))", "S(0)", "tp", False)
    order = graph_of(("moved", *move))
    assert order == ["moved"]


def halves(rank: int) -> tuple[list[Tensor], dict[str, tuple[int, int]], int]:
    import torch.distributed as dist

    them = communicator_over(dist.group.WORLD)
    them.waits = []
    x = torch.arange(12.0).view(2, 6).t().contiguous().t() + 100 * rank  # not contiguous
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
    under_way = [them.start(kind, x) for kind in kinds]
    results = []
    for result, wait in under_way:
        wait()
        results.append(result)
    whole = [getattr(them, kind)(x) for kind in kinds]
    assert all(torch.equal(*pair) for pair in zip(results, whole, strict=True))
    counted = {kind: (each.calls, each.num_bytes) for kind, each in them.stats.items()}
    return results, counted, len(them.waits)


def test_real_processes_count_halves_as_they_count_the_whole(world2: Any) -> None:
    for rank, (results, counted, waits) in enumerate(world2.run(halves)):
        mine, other = (torch.arange(12.0).view(2, 6) + 100 * r for r in (rank, 1 - rank))
        assert torch.equal(results[0], mine + other)
        assert torch.equal(results[1][1 - rank], other)
        assert torch.equal(results[2], (mine + other)[rank])
        assert torch.equal(results[3][1 - rank], other[rank])
        assert {calls for calls, _ in counted.values()} == {2}
        assert waits == 2 * len(counted)

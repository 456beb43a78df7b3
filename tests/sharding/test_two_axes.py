"""Rules compose: a call sharded over tp, and what became of it over cp, on four ranks.

Each op of the samples is placed on one axis, made rank-local, and placed on the other by the rules
for what it has become: a sharded form, or a collective that talks over the first axis.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from ilm_compile.ops.call import Call
from ilm_compile.ops.spec import spec_of
from ilm_compile.ops.strategy import global_call, localize, plain_placements, strategies
from ilm_compile.program.collectives import TRANSITIONS, redistribute
from ilm_compile.program.communicator import shape_communicators
from ilm_compile.program.layout import Layout
from ilm_compile.program.placement import Placement, S
from ilm_compile.program.values import map_tensors
from ilm_compile.proof.numbers import gather, scatter
from ilm_compile.proof.threads import run_ranks
from ilm_compile.sharding import Strategy
from tests.sharding.proof import (
    WITHOUT_GRADIENT,
    all_strategies,
    gradient_placement,
    make_call,
    provable,
    run,
)
from tests.sharding.samples import SAMPLES
from tests.support.layouts import axis

SIZES = {"tp": 2, "cp": 2}
PLACES = [S(0), S(1), S(2), S(0, (4, 4)), S(0, folded=True), *map(Placement, "IRP")]
MOVES = [(a, b) for a in PLACES for b in PLACES if (a.kind, b.kind) in TRANSITIONS and a != b]


def local_call(call: Call, strategy: Strategy) -> tuple[fx.Node, list[fx.Node]]:
    """The call of one tp rank, as the cp axis sees it, and its tensor inputs."""
    graph = fx.Graph()
    inputs = []
    for shape, place, source in zip(
        call.shapes, strategy.inputs, call.node.all_input_nodes, strict=True
    ):
        node = graph.placeholder(f"x{len(inputs)}")
        node.meta["val"] = source.meta["val"].new_empty(place.local_shape(shape, call.size))
        node.meta["val"] = node.meta["val"].to("meta")
        node.meta["layout"] = Layout.of({"tp": place})
        inputs.append(node)
    target, args, kwargs = localize(call, strategy, "tp")
    remaining = iter(inputs)
    args, kwargs = fx.node.map_arg((args, kwargs), lambda _: next(remaining))
    node = graph.call_function(target, args, kwargs)
    place = strategy.output
    val = map_tensors(
        lambda v: v.new_empty(place.local_shape(v.shape, call.size)), call.node.meta["val"]
    )
    node.meta.update(val=val, layout=Layout.of({"tp": place}))
    return node, inputs


def prove(node: fx.Node, inputs: list[fx.Node], full: list[Tensor], whole: Any) -> int:
    """Hold each cp strategy of a tp-local call against the call on `full`; returns how many."""
    call = global_call(node, axis(2, "cp"))
    constant = WITHOUT_GRADIENT.get(whole[1][0], ())
    trains = [t.is_floating_point() and i not in constant for i, t in enumerate(full)]
    leaves = [t.clone().requires_grad_(each) for t, each in zip(full, trains, strict=True)]
    expected = run(*whole, leaves)
    trained = [value for value in expected if value.requires_grad]
    seeds = [torch.randn_like(value) for value in trained]
    if trained:
        torch.autograd.backward(trained, seeds)
    others = S(0, (4, 4)), S(1, (2, 2)), S(1, folded=True), S(2, folded=True)
    segmented = {p for p in others if p.divides(call.shape, 2)}
    found = provable(call, strategies(call, plain_placements(call.shape, 2) | segmented))
    for strategy in found:
        compare(node, inputs, call, strategy, full, leaves, expected, seeds)
    return len(found)


def compare(node, inputs, call, strategy, full, leaves, expected, seeds) -> None:
    tp = [n.meta["layout"].on("tp") for n in (*inputs, node)]
    cp = [*strategy.inputs, strategy.output]
    layouts = [Layout.of({"tp": a, "cp": b}) for a, b in zip(tp, cp, strict=True)]
    gradients = [
        Layout.of({"tp": gradient_placement(a), "cp": gradient_placement(b)})
        for a, b in zip(tp, cp, strict=True)
    ]
    held = [spread(t, each) for t, each in zip(full, layouts, strict=False)]
    starts = [spread(seed.double(), gradients[-1]) for seed in seeds]
    bound = 1e-5 if node.target is torch.ops.aten.to.dtype else 1e-10
    local = localize(call, strategy, "cp")

    def rank(number: int) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
        own = [parts[number].clone() for parts in held]
        own = [t.requires_grad_(leaf.requires_grad) for t, leaf in zip(own, leaves, strict=True)]
        values = run(node, local, own)
        trained = [value for value in values if value.requires_grad]
        if starts:
            pairs = zip(trained, starts, strict=True)
            torch.autograd.backward(trained, [each[number].to(v.dtype) for v, each in pairs])
        return tuple(v.detach() for v in values), [t.grad for t in own]

    results = run_ranks(SIZES, rank)
    for index, right in enumerate(expected):
        parts = [values[index] for values, _ in results]
        for value in gather(parts, layouts[-1], SIZES, "value"):
            torch.testing.assert_close(value, right.detach(), rtol=bound, atol=bound)
    for index, leaf in enumerate(leaves):
        parts = [grads[index] for _, grads in results]
        if leaf.grad is None or any(part is None for part in parts):
            assert leaf.grad is None
            continue
        for value in gather(parts, gradients[index], SIZES, "value"):
            torch.testing.assert_close(value, leaf.grad, rtol=bound, atol=bound)


def spread(full: Tensor, layout: Layout) -> list[Tensor]:
    node = fx.Graph().placeholder("x")
    node.meta.update(val=full.new_empty(layout.local_shape(full.shape, SIZES)), layout=layout)
    return scatter(full, node, SIZES, "value")


FORMS = [
    pytest.param(target, make, id=f"{getattr(target, '__name__', target)}-{index}")
    for target, makes in SAMPLES.items()
    if not isinstance(target, str) and not spec_of(target).talks  # made when all axes are placed
    for index, make in enumerate(makes)
]


@pytest.mark.parametrize(("target", "make"), FORMS)
def test_what_an_op_became_on_one_axis_is_placed_on_the_other(target, make):
    torch.manual_seed(0)
    args, kwargs = make()
    call, tensors = make_call(target, args, kwargs, 2)
    sharded = [s for s in all_strategies(call) if any(p.is_shard for p in s.inputs)]
    forms = [s for s in sharded if spec_of(localize(call, s, "tp")[0]).stands_for]
    for strategy in (*forms, *[s for s in sharded if s not in forms][:2]):
        node, inputs = local_call(call, strategy)
        assert prove(node, inputs, tensors, (call.node, (call.target, call.args, call.kwargs))) >= 2


@pytest.mark.parametrize(("src", "dst"), MOVES, ids=str)
def test_a_collective_over_one_axis_is_placed_on_the_other(src, dst):
    torch.manual_seed(0)
    graph, full = fx.Graph(), torch.randn(8, 4, 4, dtype=torch.float64)
    value = graph.placeholder("x")
    value.meta["val"] = torch.empty(src.local_shape(full.shape, 2), device="meta")
    value.meta["layout"] = Layout.of({"tp": src})
    arguments = {"src": str(src), "dst": str(dst), "axis": "tp"}
    node = graph.call_function(redistribute, (value,), arguments)
    with shape_communicators(SIZES):
        node.meta["val"] = redistribute(value.meta["val"], **arguments)
    node.meta["layout"] = Layout.of({"tp": dst})
    same = graph.call_function(torch.ops.aten.clone.default, (value,))
    assert prove(node, [value], [full], (same, (same.target, same.args, same.kwargs))) >= 3

"""The structural check refuses each way in which a pass can leave a program wrong."""

import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from ilm_compile.errors import ProgramError
from ilm_compile.program.check import check_structure
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.gradients import gradient_nodes
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace

aten = torch.ops.aten


class Model(nn.Module):
    """A layer, a frozen one, and a value no gradient may flow through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        frozen = self.frozen(x).exp()
        best = y.argmax(-1)
        return {"loss": (y * y.detach().tanh() * frozen).sum(), "best": best}


def program() -> Program:
    return trace(Model(), example_inputs={"x": ((2, 4), torch.float32)})


def named(p: Program, name: str) -> fx.Node:
    return next(node for node in p.graph.nodes if node.name == name)


def insert(p: Program, make: Callable[[fx.Graph, fx.Node], fx.Node], **meta: object) -> None:
    """Put a node behind exp, used by what used exp, with the meta of exp."""
    exp = named(p, "exp")
    with p.graph.inserting_after(exp):
        node = make(p.graph, exp)
    exp.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    node.meta = {**exp.meta, **meta}


def call_module(p: Program) -> None:
    p.graph_module.add_submodule("extra", nn.Identity())
    insert(p, lambda graph, x: graph.call_module("extra", (x,)))


def call_method(p: Program) -> None:
    insert(p, lambda graph, x: graph.call_method("exp", (x,)))


def python_function(p: Program) -> None:
    insert(p, lambda graph, x: graph.call_function(operator.neg, (x,)))


def overload_packet(p: Program) -> None:
    insert(p, lambda graph, x: graph.call_function(aten.neg, (x,)))


def no_region(p: Program) -> None:
    del named(p, "exp").meta["region"]


def region_that_is_none(p: Program) -> None:
    named(p, "exp").meta["region"] = len(p.regions)


def unknown_attribute(p: Program) -> None:
    del p.variables["layer.bias"]


def no_val(p: Program) -> None:
    del named(p, "exp").meta["val"]


def val_that_is_no_tensor(p: Program) -> None:
    named(p, "exp").meta["val"] = (2, 4)


HERE = r"at node \w+ \((?:layer, )?.*test_check.py:\d+\)"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (call_module, "call_module is not allowed, only call_function; inline the call at node"),
        (call_method, "call_method is not allowed, only call_function; inline the call at node"),
        (python_function, rf"neg.* is no op and no typed collective; register it as an op {HERE}"),
        (overload_packet, rf"neg is no op and no typed collective; register it as an op {HERE}"),
        (no_region, rf"no region; copy the meta of a neighbour {HERE}"),
        (region_that_is_none, rf"no region; copy the meta of a neighbour {HERE}"),
        (unknown_attribute, "layer.bias is not among program.variables at node layer_bias"),
        (no_val, rf"no FakeTensor in node.meta\['val'\] {HERE}"),
        (val_that_is_no_tensor, rf"no FakeTensor in node.meta\['val'\] {HERE}"),
    ],
)
def test_refused(spoil: Callable[[Program], None], message: str) -> None:
    spoiled = program()
    spoil(spoiled)
    with pytest.raises(ProgramError, match=message):
        check_structure(spoiled)


def test_lost_output_is_refused() -> None:
    spoiled = program()
    output = spoiled.graph.output_node()
    output.args = (output.args[0][:1],)  # type: ignore[index]
    with pytest.raises(ProgramError, match=r"outputs \('loss', 'best'\), got \['sum_1'\]"):
        check_structure(spoiled)


def test_broken_graph_is_refused() -> None:
    spoiled = program()
    named(spoiled, "linear").prepend(named(spoiled, "sum_1"))
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        check_structure(spoiled)


def test_typed_collective_is_allowed() -> None:
    good = program()
    placements = {"src": "I", "dst": "R", "axis": "tp"}
    insert(good, lambda graph, x: graph.call_function(redistribute, (x,), placements))
    check_structure(good)


def test_finish_drops_dead_nodes_and_regenerates_the_code() -> None:
    changed = program()
    exp = named(changed, "exp")
    with changed.graph.inserting_after(exp):
        changed.graph.call_function(aten.neg.default, (exp,))
    changed.finish()
    assert not changed.graph.find_nodes(op="call_function", target=aten.neg.default)
    assert "neg" not in changed.graph_module.code


def test_gradient_flows_from_trained_parameters_through_floating_values() -> None:
    names = {node.name for node in gradient_nodes(program().graph)}
    assert names == {"layer_weight", "layer_bias", "linear", "mul", "mul_1", "sum_1"}

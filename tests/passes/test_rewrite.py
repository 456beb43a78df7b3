"""Finding and rewriting calls: patterns, module paths, and metadata that stays complete."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ilm_compile.errors import ProgramError
from ilm_compile.models import internlm2_tiny
from ilm_compile.passes import (
    Pass,
    PipelineSplit,
    TensorParallel,
    check_program,
    insert_after,
    insert_before,
    matches,
    nodes_in,
    replace,
    replace_call,
    run_passes,
    wrap,
)
from ilm_compile.program.copy import copy_program
from ilm_compile.program.placement import S
from ilm_compile.program.plan import Plan
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from tests.support.layouts import placed

aten = torch.ops.aten
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_kv_attention_heads": 2}
Make = Callable[[Tensor], Tensor]


class Body(nn.Module):
    """A function of a (4, 8) tensor, with a mean as the loss."""

    def __init__(self, function: Make) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.function = function

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.function(x * self.weight)
        return {"loss": y.mean(), "y": y}


def traced(function: Make) -> Program:
    return trace(Body(function), example_inputs={"x": ((4, 8), torch.float32)})


def decoder(*, tp: int = 1, stages: int = 1) -> Program:
    return copy_program(_decoder(tp, stages))


@cache
def _decoder(tp: int, stages: int) -> Program:
    program = trace(internlm2_tiny(num_layers=2, **SIZES))
    program.plan = Plan(tp=tp)
    passes: list[Pass] = [TensorParallel(size=tp)] if tp > 1 else []
    passes += [PipelineSplit(num_stages=stages)] if stages > 1 else []
    run_passes(program, passes)
    return program


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def check(program: Program) -> None:
    program.finish()
    check_program(program)


def value(program: Program, x: Tensor, weight: Tensor) -> Tensor:
    """The second output of a `traced` program."""
    module = program.graph_module
    module.weight = nn.Parameter(weight)
    result: Tensor = module(x)[1]
    return result


def targets(nodes: tuple[fx.Node, ...] | list[fx.Node]) -> list[Any]:
    return [node.target for node in nodes]


@pytest.mark.parametrize(
    ("written", "pattern"),
    [
        pytest.param(lambda x: F.silu(x) * x.exp(), swiglu, id="as written"),
        pytest.param(lambda x: x.exp().mul(F.silu(x)), swiglu, id="operands exchanged, method"),
        pytest.param(
            lambda x: F.silu(x) * x.exp(),
            lambda gate, up: aten.mul.Tensor(aten.silu.default(gate), up),
            id="pattern of ops",
        ),
    ],
)
def test_pattern_matches_however_it_is_written(written: Make, pattern: Any) -> None:
    (match,) = matches(traced(written), pattern)
    assert {name: node.target for name, node in match.inputs.items()} == {
        "gate": aten.mul.Tensor,
        "up": aten.exp.default,
    }
    assert targets(match.nodes) == [aten.silu.default, aten.mul.Tensor]
    assert match.output is match.nodes[-1]


@pytest.mark.parametrize(
    ("written", "pattern"),
    [
        pytest.param(lambda x: F.relu(x) * x, swiglu, id="another op"),
        pytest.param(lambda x: x.exp() - x.sin(), lambda a, b: b.sin() - a.exp(), id="order"),
        pytest.param(lambda x: x.exp() * x.sin(), lambda a: a * a, id="one wildcard, two values"),
        pytest.param(lambda x: x * 3, lambda a: a * 2, id="another number"),
        pytest.param(lambda x: x.sum(1), lambda a: a.sum(0), id="another dimension"),
        pytest.param(lambda x: x.sum(1), lambda a: a.sum(1, keepdim=True), id="a default argument"),
    ],
)
def test_pattern_does_not_match(written: Make, pattern: Any) -> None:
    assert matches(traced(written), pattern) == []


def test_default_argument_may_be_written_out() -> None:
    program = traced(lambda x: aten.softmax.int(x, 1, None))
    assert len(matches(program, lambda x: aten.softmax.int(x, 1))) == 1


def test_scalar_wildcard_binds_what_stands_there() -> None:
    def pattern(x: Tensor, scale: float = 1.25e-5, dims: tuple[int, ...] = (1,)) -> Tensor:
        return (x * scale).sum(dims)

    (match,) = matches(traced(lambda x: (x * 7).sum((0, 1))), pattern)
    assert (match.inputs["scale"], match.inputs["dims"]) == (7, [0, 1])


def test_scalar_wildcard_used_twice_must_agree() -> None:
    def pattern(x: Tensor, s: float = 1.25e-5) -> Tensor:
        return torch.exp(x * s) / s

    assert len(matches(traced(lambda x: torch.exp(x * 3.0) / 3.0), pattern)) == 1
    assert matches(traced(lambda x: torch.exp(x * 3.0) / 4.0), pattern) == []


def test_tensor_default_gives_shape_and_dtype() -> None:
    vector = torch.empty(4)

    def norm(x: Tensor, w: Tensor = vector, shape: Any = (4,), eps: float = 3e-9) -> Tensor:
        return F.rms_norm(x, shape, w, eps)

    found = matches(decoder(), norm)
    assert [match.inputs["eps"] for match in found] == [1e-5] * 5


def test_matches_do_not_overlap() -> None:
    program = traced(lambda x: x.exp().exp().exp())
    assert len(matches(program, lambda x: x.exp().exp())) == 1


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        pytest.param(
            lambda x: (x, x), "expected <lambda> to return one tensor, got tuple", id="two"
        ),
        pytest.param(lambda x: x, "<lambda> calls no op", id="empty"),
        pytest.param(lambda x, y: x.exp(), r"takes its parameters \['y'\]", id="unused"),
        pytest.param(lambda x, s=2.5: x.exp(), r"takes its parameters \['s'\]", id="scalar"),
        pytest.param(
            lambda x: F.conv2d(x, x), r"x \[4, 4\] torch.float32.*\n.*example", id="shape"
        ),
        pytest.param(torch.tanh, "named parameters, got <built-in method tanh", id="builtin"),
    ],
)
def test_function_that_is_no_pattern(pattern: Any, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        matches(traced(torch.exp), pattern)


def test_replace_computes_the_replacement() -> None:
    program = traced(lambda x: F.silu(x) * x.exp() + 1)
    replace(program, swiglu, lambda gate, up: torch.tanh(gate) - up)
    check(program)
    x, w = torch.randn(4, 8), torch.randn(8)
    torch.testing.assert_close(value(program, x, w), (x * w).tanh() - (x * w).exp() + 1)
    assert aten.silu.default not in targets(list(program.calls()))


def test_replacement_is_traced_for_the_shape_and_scalars_of_the_match() -> None:
    def pattern(x: Tensor, s: float = 1.25e-5) -> Tensor:
        return x.exp() * s

    def flat(s: float, x: Tensor) -> Tensor:
        return (x.flatten() * s).view_as(x)

    program = traced(lambda x: x.exp() * 3 + x.T.contiguous().exp().T * 5)
    replace(program, pattern, flat)
    check(program)
    shapes = [n.args[1] for n in program.calls() if n.target is aten.reshape.default]
    assert shapes == [[32], [4, 8]]
    scales = [n.args[1] for n in program.calls() if n.target is aten.mul.Tensor]
    assert 3 in scales


def test_replace_of_a_chain_of_matches() -> None:
    program = traced(lambda x: x.exp().exp().exp())
    assert len(replace(program, lambda x: x.exp(), lambda x: x.sin())) == 3
    check(program)
    x, w = torch.randn(4, 8), torch.randn(8)
    torch.testing.assert_close(value(program, x, w), (x * w).sin().sin().sin())


def test_replacement_may_be_an_input() -> None:
    program = traced(lambda x: x.neg().neg().exp())
    replace(program, lambda x: x.neg().neg(), lambda x: x)
    check(program)
    assert aten.neg.default not in targets(list(program.calls()))


def test_inner_value_used_elsewhere_is_refused_and_nothing_changed() -> None:
    def shared(x: Tensor) -> Tensor:
        inner = F.silu(x.sin())
        return F.silu(x) * x.exp() + inner * x.cos() + inner

    program = traced(shared)
    before = program.dump()
    with pytest.raises(ProgramError, match=r"node silu .* inside a match .* add_\d uses it too"):
        replace(program, swiglu, lambda gate, up: gate * up)
    assert program.dump() == before
    found = replace(program, swiglu, lambda gate, up: gate * up, where=lambda m: not m.escaping)
    assert len(found) == 1


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        pytest.param(lambda gate, other: gate, r"takes \['other'\].*\['gate', 'up'\]", id="name"),
        pytest.param(lambda gate, up: gate.sum(0), r"expected shape \(4, 8\)", id="shape"),
        pytest.param(lambda gate, up: gate.double(), "expected dtype torch.float32", id="dtype"),
    ],
)
def test_replacement_that_does_not_fit(replacement: Any, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        replace(traced(lambda x: F.silu(x) * x.exp()), swiglu, replacement)


def test_replacement_keeps_region_source_and_stage() -> None:
    program = decoder(tp=2, stages=2)
    before = [(n.meta["region"], n.meta["stage"], n.meta["source"]) for n in ends(program)]
    replace(program, swiglu, lambda gate, up: torch.sigmoid(gate) * gate * up)
    check(program)
    after = [(n.meta["region"], n.meta["stage"], n.meta["source"]) for n in ends(program)]
    assert after == before
    sigmoids = [n for n in program.calls() if n.target is aten.sigmoid.default]
    assert [n.meta["stage"] for n in sigmoids] == [stage for _, stage, _ in before]


def ends(program: Program) -> list[fx.Node]:
    """The product that ends each SwiGLU."""
    calls = nodes_in(program, "layers.*.feed_forward.w2")
    return [n.args[0] for n in calls if n.target is aten.linear.default]  # type: ignore[misc]


def test_placement_of_a_sharded_replacement_follows_by_rule() -> None:
    program = decoder(tp=2)
    for node in replace(program, swiglu, lambda gate, up: torch.sigmoid(gate) * gate * up):
        assert placed(node) == S(2)
        assert node.meta["val"].shape[2] * 2 == 256
    check(program)


def test_placement_that_does_not_follow_is_refused() -> None:
    program = decoder(tp=2)
    with pytest.raises(ProgramError, match=r"placement of aten.cumsum.*Register a rule"):
        replace(program, swiglu, lambda gate, up: gate.cumsum(2) * up)


def test_nonlinear_op_of_a_partial_sum_is_refused() -> None:
    program = decoder(tp=2)
    partial = next(n for n in program.calls() if str(placed(n)) == "P")
    with pytest.raises(ProgramError, match=r"placement of aten.tanh.*from its inputs \(P,\)"):
        wrap(program, partial, torch.tanh)


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("layers.1.feed_forward", 5),
        ("layers.*.feed_forward", 10),
        ("layers.*.feed_forward.w?", 6),
        ("layers.1", 32),
        ("*.feed_forward", 0),
        ("layer", 0),
    ],
)
def test_nodes_in_a_module_path(path: str, count: int) -> None:
    program = decoder()
    found = nodes_in(program, path)
    if path == "layers.1":
        count = sum(program.source(n).module_path.startswith(path) for n in program.calls())
    assert len(found) == count
    assert found == [node for node in program.calls() if node in set(found)]


def test_nodes_in_everything() -> None:
    program = decoder()
    assert nodes_in(program, "") == list(program.calls())


@pytest.mark.parametrize("insert", [insert_before, insert_after])
def test_inserted_call_is_complete(insert: Any) -> None:
    program = decoder(tp=2, stages=2)
    node = nodes_in(program, "layers.1.feed_forward.w1")[-1]
    new = insert(program, node, aten.relu.default, node if insert is insert_after else node.args[0])
    assert (node.next is new) == (insert is insert_after)
    assert (new.next is node) == (insert is insert_before)
    for key in ("region", "stage", "source"):
        assert new.meta[key] == node.meta[key]
    assert placed(new) == placed(new.args[0])
    assert new.meta["val"].shape == new.args[0].meta["val"].shape
    new.replace_all_uses_with(new)
    program.graph.lint()


def test_insert_after_a_parameter_lands_in_the_region_that_uses_it() -> None:
    program = decoder()
    weight = next(n for n in program.graph.nodes if n.target == "layers.1.feed_forward.w1.weight")
    (user,) = weight.users
    new = insert_after(program, weight, aten.mul.Tensor, weight, 0.5)
    assert new.next is user
    assert new.meta["region"] == user.meta["region"]


def test_insert_before_the_output() -> None:
    program = decoder()
    loss = program.outputs[0]
    new = insert_before(program, program.graph.output_node(), aten.neg.default, loss)
    assert new.meta["region"] == loss.meta["region"]


def test_insert_after_an_unused_value_is_refused() -> None:
    program = decoder()
    unused = next(iter(program.graph.nodes))
    for user in list(unused.users):
        user.replace_input_with(unused, program.graph.find_nodes(op="placeholder")[1])
    with pytest.raises(ProgramError, match="no call uses node input_ids"):
        insert_after(program, unused, aten.neg.default, unused)


def test_call_of_several_results_is_refused() -> None:
    program = traced(torch.exp)
    node = program.outputs[1]
    with pytest.raises(ProgramError, match="expected a call that returns one tensor, got tuple"):
        insert_after(program, node, aten.topk.default, node, 2)


def test_replace_call_takes_over_the_users() -> None:
    program = traced(lambda x: x.exp() + 1)
    old = next(n for n in program.calls() if n.target is aten.exp.default)
    replace_call(program, old, aten.sin.default, *old.args)
    check(program)
    x, w = torch.randn(4, 8), torch.randn(8)
    torch.testing.assert_close(value(program, x, w), (x * w).sin() + 1)


def test_wrap_reroutes_every_user_but_itself() -> None:
    program = traced(lambda x: x.exp() + x)
    inner = next(n for n in program.calls() if n.target is aten.mul.Tensor)
    wrap(program, inner, lambda v: v * torch.sigmoid(v))
    check(program)
    x, w = torch.randn(4, 8), torch.randn(8)
    y = (x * w) * torch.sigmoid(x * w)
    torch.testing.assert_close(value(program, x, w), y.exp() + y)

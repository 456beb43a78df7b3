"""The one dialect: what normalisation makes of each form in which a model can be written."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.errors import TraceError
from ilm_compile.program.check import check_structure
from ilm_compile.program.dump import target_name
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from tests.program.execute import Apply, run_program, trace_and_compare
from tests.program.samples import MODELS, build, traced

aten = torch.ops.aten
Function = Callable[[Apply, Tensor], Tensor]


def targets(program: Program) -> list[str]:
    """The ops of a program in order, without those that `Apply` adds around its function."""
    return [target_name(node) for node in program.calls()][1:-1]


@pytest.mark.parametrize("name", MODELS)
def test_structure_is_right(name: str) -> None:
    check_structure(traced(name))


@pytest.mark.parametrize("name", MODELS)
def test_every_call_is_an_op(name: str) -> None:
    program = traced(name)
    assert {n.op for n in program.graph.nodes} == {
        *("placeholder", "get_attr", "call_function", "output")
    }
    assert all(isinstance(n.target, torch._ops.OpOverload) for n in program.calls())


@pytest.mark.parametrize("name", MODELS)
def test_attributes_have_the_users_names(name: str) -> None:
    model, program = build(name)[0], traced(name)
    names = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    found = [str(n.target) for n in program.graph.find_nodes(op="get_attr")]
    assert set(found) <= names
    assert set(found) >= set(dict(model.named_parameters()))
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", MODELS)
def test_no_call_is_dead_or_does_nothing(name: str) -> None:
    program = traced(name)
    for node in program.calls():
        assert node.users, node
        assert "assert" not in str(node.target)
        if node.target is aten.to.dtype:
            assert node.args[0].meta["val"].dtype != node.meta["val"].dtype
        if node.target in (aten.reshape.default, aten.expand.default):
            assert node.args[0].meta["val"].shape != node.meta["val"].shape


@pytest.mark.parametrize("name", MODELS)
def test_no_call_names_a_device(name: str) -> None:
    for node in traced(name).calls():
        assert not {"device", "layout", "pin_memory"} & set(node.kwargs)
        assert not any(isinstance(arg, torch.device) for arg in node.args)


WHOLE = {
    "internlm": {"linear": 11, "embedding": 1, "rms_norm": 5, "attention": 2},
    "internlm2": {"linear": 11, "embedding": 1, "rms_norm": 5, "attention": 2},
    "llama": {"linear": 15, "embedding": 1, "scaled_dot_product_attention": 2},
    "gpt2": {"linear": 1, "addmm": 8, "layer_norm": 5, "scaled_dot_product_attention": 2},
    "tied": {"linear": 9, "rms_norm": 2, "layer_norm": 2, "scaled_dot_product_attention": 2},
}


@pytest.mark.parametrize("name", MODELS)
def test_composite_ops_stay_whole(name: str) -> None:
    found = [target_name(node).split(".")[-1] for node in traced(name).calls()]
    assert {op: found.count(op) for op in WHOLE[name]} == WHOLE[name]
    assert found.count("cross_entropy_loss") == 1


FORMS: dict[str, tuple[Function, list[str]]] = {
    "view": (lambda m, x: x.view(2, 2, -1), ["aten.reshape"]),
    "flatten": (lambda m, x: x.flatten(), ["aten.reshape"]),
    "unflatten": (lambda m, x: x.unflatten(0, (2, 2)), ["aten.reshape"]),
    "view_as": (lambda m, x: x.view_as(m.scale.expand(4, 6)), []),
    "view of the same shape": (lambda m, x: x.view(4, 6), []),
    "expand_as": (lambda m, x: m.scale.expand_as(x) * x, ["aten.expand", "aten.mul.Tensor"]),
    "T": (lambda m, x: x.T, ["aten.permute"]),
    "cast": (lambda m, x: x.float(), ["aten.to.dtype"]),
    "type_as": (lambda m, x: x.int().type_as(x) * x, [*["aten.to.dtype"] * 2, "aten.mul.Tensor"]),
    "cast to its own dtype": (lambda m, x: x.to(torch.float64).double().type_as(x), []),
    "to its own device": (lambda m, x: x.to(x.device), []),
    "last of all": (
        lambda m, x: x.unbind(-1)[-1] * x.split(2, -1)[0][:, 1],
        ["aten.select.int", "aten.slice.Tensor", "aten.select.int", "aten.mul.Tensor"],
    ),
    "whole slice": (lambda m, x: x[:, :], []),
    "every second": (lambda m, x: x[::2], ["aten.slice.Tensor"]),
    "split": (lambda m, x: x.split(2, -1)[1], ["aten.slice.Tensor"]),
    "split by sizes": (lambda m, x: x.split([1, 5], 1)[1], ["aten.slice.Tensor"]),
    "chunk": (lambda m, x: x.chunk(4, -1)[2], ["aten.slice.Tensor"]),
    "unbind": (lambda m, x: x.unbind(-1)[3], ["aten.select.int"]),
    "unpacking": (
        lambda m, x: torch.mul(*x.chunk(2, 1)),
        [*["aten.slice.Tensor"] * 2, "aten.mul.Tensor"],
    ),
    "dropout of nothing": (lambda m, x: F.dropout(x, 0.0, True), []),
    "dropout in evaluation": (lambda m, x: F.dropout(x, 0.5, False), []),
    "dead code": (lambda m, x: [x, x.exp() * 2][0], []),
}


@pytest.mark.parametrize(("function", "expected"), FORMS.values(), ids=FORMS)
def test_form(function: Function, expected: list[str]) -> None:
    model = Apply(function)
    program = trace_and_compare(model, model.example_inputs())
    assert targets(program) == expected
    check_structure(program)


def test_pieces_are_counted_from_the_front() -> None:
    program = trace(Apply(lambda m, x: x.unbind(-1)[-1] * x.split(2, -1)[2][:, 1]))
    call_args = {target_name(node): node.args[1:] for node in program.calls()}
    assert call_args["aten.slice.Tensor"] == (1, 4, 6)
    selects = program.graph.find_nodes(op="call_function", target=aten.select.int)
    assert [node.args[1:] for node in selects] == [(1, 5), (1, 1)]


def no_grad(model: Apply, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = (model.scale * x).tanh()
        shift = x.mean()
    return x * scale + shift


def no_grad_around_enable_grad(model: Apply, x: Tensor) -> Tensor:
    with torch.no_grad():
        with torch.enable_grad():
            y = x * model.scale
        z = y * 2
    return y + z


def no_grad_that_passes_on(model: Apply, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x
    return y * model.scale


@pytest.mark.parametrize("function", [no_grad, no_grad_around_enable_grad, no_grad_that_passes_on])
def test_no_grad_block_is_inlined(function: Function) -> None:
    model = Apply(function)
    program = trace_and_compare(model, model.example_inputs())
    check_structure(program)


def test_no_gradient_flows_out_of_a_no_grad_block() -> None:
    model = Apply(no_grad)
    program = trace(model)
    _, gradients = run_program(program, model, model.example_inputs())
    assert "scale" not in gradients
    assert targets(program).count("aten.detach") == 2


def add_in_place(model: Apply, x: Tensor) -> Tensor:
    y = x * 2
    y += model.scale
    return y * x


def write_a_slice(model: Apply, x: Tensor) -> Tensor:
    y = x * model.scale
    y[:, 1:3] = x[:, :2]
    y[0] = 0.0
    y[:, 4] = x[:, 4].float()
    return y * y


def write_through_a_view(model: Apply, x: Tensor) -> Tensor:
    y = x * 2
    y.view(2, -1)[1].mul_(model.scale.repeat(2))
    return y * y


def fill_masked(model: Apply, x: Tensor) -> Tensor:
    y = x * model.scale
    y.masked_fill_(x > 0, 3.0)
    return y * x


def relu_in_place(model: Apply, x: Tensor) -> Tensor:
    return F.relu(x * 2, inplace=True) * model.scale


IN_PLACE = [add_in_place, write_a_slice, write_through_a_view, fill_masked, relu_in_place]


@pytest.mark.parametrize("function", IN_PLACE)
def test_in_place_ops_are_functionalised(function: Function) -> None:
    model = Apply(function)
    program = trace_and_compare(model, model.example_inputs())
    assert not any(node.target._schema.is_mutable for node in program.calls())
    check_structure(program)


def test_composite_ops_stay_whole_beside_in_place_ops() -> None:
    def function(model: Apply, x: Tensor) -> Tensor:
        y = model.linear(x)
        y += 1
        y = F.dropout(F.rms_norm(y, (6,)), 0.5, True)
        left, right = y.chunk(2, -1)
        return F.scaled_dot_product_attention(left[None], right[None], right[None])

    program = trace(Apply(function))
    check_structure(program)
    assert [t for t in targets(program) if t not in ("aten.unsqueeze", "aten.slice.Tensor")] == [
        *("aten.linear", "aten.add.Tensor", "aten.rms_norm", "seeded_dropout"),
        "aten.scaled_dot_product_attention",
    ]


def autocast(model: Apply, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.linear(x)


def cond(model: Apply, x: Tensor) -> Tensor:
    result: Tensor = torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y * 3, (x,))
    return result


def in_place_under_no_grad(model: Apply, x: Tensor) -> Tensor:
    y = x * model.scale
    with torch.no_grad():
        y.mul_(2)
    return y


HERE = r".*execute.py:\d+"  # the line of the innermost forward


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (autocast, rf"turns autocast on \(linear, {HERE}\).*dtype=torch.bfloat16"),
        (
            cond,
            rf"\(at {HERE}.*control flow \(torch.cond, while_loop\), .* no registered op",
        ),
        (
            lambda m, x: torch.var_mean(x)[0],
            rf"aten.var_mean.correction \({HERE}\), expected an op that returns one tensor",
        ),
        (in_place_under_no_grad, r"mul_.* changes a value in place under torch.no_grad"),
    ],
    ids=["autocast", "cond", "several results", "in-place under no_grad"],
)
def test_refused(function: Function, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(Apply(function))


def test_in_place_beside_a_no_grad_block_without_activations_is_allowed() -> None:
    def function(model: Apply, x: Tensor) -> Tensor:
        with torch.no_grad():
            steps = torch.arange(6, device=x.device).to(x.dtype).cos()
        y = x * steps
        y += model.scale
        return y * y

    model = Apply(function)
    trace_and_compare(model, model.example_inputs())

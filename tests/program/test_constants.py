"""Constants made in a model's forward keep their value, though tracing has no data."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ilm_compile.errors import TraceError
from ilm_compile.program.check import check_structure
from ilm_compile.program.trace import trace
from tests.program.execute import FEATURES, Apply, run_program, trace_and_compare

Function = Callable[[Apply, Tensor], Tensor]


def tensor(x: Tensor, data: Any, **options: Any) -> Tensor:
    return torch.tensor(data, device=x.device, **options)


KEPT: dict[str, Function] = {
    "a number": lambda m, x: x * tensor(x, 2.5),
    "an integer": lambda m, x: x * tensor(x, 3),
    "a truth value": lambda m, x: torch.where(tensor(x, True), x, -x),
    "a list": lambda m, x: x * tensor(x, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    "a nested list": lambda m, x: x @ tensor(x, [[1, 2, 0, 0, 1, 3]] * FEATURES).double(),
    "mixed numbers": lambda m, x: x * tensor(x, [1, 2.5] * 3),
    "a dtype": lambda m, x: x * tensor(x, [0.1] * 6, dtype=torch.float64),
    "no device": lambda m, x: x * torch.tensor(2.5),
    "a list like another tensor": lambda m, x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
    "a made table without a device": lambda m, x: x * torch.linspace(0, 1, FEATURES),
    "full of a constant": lambda m, x: x + torch.full((4, FEATURES), tensor(x, -3.5)),
    "full of a computed value": lambda m, x: x + torch.full((4, FEATURES), x.detach().sum()),
    "full like, of a computed value": lambda m, x: x * torch.full_like(x, x.detach().mean()),
    "the data of a weight": lambda m, x: x * m.scale.data,
    "index list": lambda m, x: x[[0, 2, 2]],
    "index list of one": lambda m, x: x[[1]],
    "index list of one, from the end": lambda m, x: x[:, [-1]],
    "index list of one, last but one": lambda m, x: x[:, [-2]],
    "index list after dots": lambda m, x: x[..., [5, 0]],
    "index list beside a new dim": lambda m, x: x[None, :, [1]],
    "index list beside a slice": lambda m, x: x[1:, [0, 3]],
    "two index lists": lambda m, x: x[[0, 1], [5, 4]],
    "two index lists of one": lambda m, x: x[[2], [5]],
    "index list beside a number": lambda m, x: x[0, [1, 2]],
    "index list beside a tensor": lambda m, x: x[torch.arange(2, device=x.device), [5, 4]],
    "nested index list": lambda m, x: x[:, [[0, 1], [2, 3]]],
}


@pytest.mark.parametrize("function", KEPT.values(), ids=KEPT)
def test_constant_keeps_its_value(function: Function) -> None:
    model = Apply(function)
    program = trace_and_compare(model, model.example_inputs())
    check_structure(program)


@pytest.mark.parametrize("index", [[0], [-1], [-2], [1, 2]], ids=str)
def test_index_of_one_is_a_slice_and_of_several_an_index(index: list[int]) -> None:
    program = trace(Apply(lambda m, x: x[:, index]))
    ops = {str(node.target) for node in program.calls()}
    assert ("aten.slice.Tensor" in ops) == (len(index) == 1)
    assert ("aten.index.Tensor" in ops) == (len(index) > 1)


class PlainAttribute(Apply):
    """Holds tensors that are neither parameters nor buffers, in the ways that people hold them."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: (x * m.factor + m.more[0] + m.named["shift"]) * m.number)
        self.factor = torch.linspace(1, 2, FEATURES, dtype=torch.float64)
        self.more = [torch.ones(FEATURES, dtype=torch.float64)]
        self.named = {"shift": torch.full((FEATURES,), 0.25, dtype=torch.float64)}
        self.number = torch.tensor(3.0, dtype=torch.float64)


def test_tensor_held_by_the_model_is_a_buffer_with_its_value() -> None:
    model = PlainAttribute()
    program = trace_and_compare(model, model.example_inputs())
    constants = {n: v for n, v in program.variables.items() if n.startswith("constant_")}
    assert [(v.shape, v.is_parameter, v.persistent) for v in constants.values()] == [
        ((FEATURES,), False, False)
    ] * 3
    held = [*model.more, model.factor, model.named["shift"]]
    found = [program.graph_module.get_buffer(name) for name in constants]
    assert sorted(t.sum().item() for t in found) == sorted(t.sum().item() for t in held)
    check_structure(program)


def test_number_held_by_the_model_is_a_fill() -> None:
    program = trace(PlainAttribute())
    fills = program.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
    assert [node.args for node in fills] == [([], 3.0)]


def test_model_keeps_its_constants() -> None:
    model = PlainAttribute()
    held = [model.factor, model.more[0], model.named["shift"], model.number]
    program = trace(model)
    run_program(program, model, model.example_inputs())
    assert [model.factor, model.more[0], model.named["shift"], model.number] == held
    assert model.number.item() == 3.0


def test_tensor_without_a_value_is_refused() -> None:
    model = PlainAttribute()
    model.factor = model.factor.to("meta")
    with pytest.raises(TraceError, match=r"shape \(6,\) that is on the meta device and no buffer"):
        trace(model)


def test_tensor_with_a_gradient_that_is_no_parameter_is_refused() -> None:
    model = PlainAttribute()
    model.more[0].requires_grad_()
    with pytest.raises(TraceError, match=r"has a gradient but is no parameter .*\(at .*py:\d+"):
        trace(model)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_list_of_lists_alone_is_an_index_of_each_dim() -> None:
    model = Apply(lambda m, x: x[[[0, 1], [2, 3]]])
    trace_and_compare(model, model.example_inputs())


def test_tensor_is_itself_again_after_tracing() -> None:
    trace(Apply(lambda m, x: x * tensor(x, 2.5)))
    assert torch.tensor([1.5]).tolist() == [1.5]
    assert torch.arange(3)[[1]].tolist() == [1]

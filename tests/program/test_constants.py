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
    """Holds a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__(lambda m, x: x * m.factor)
        self.factor = torch.tensor(3.0, dtype=torch.float64)


def test_lifted_constant_is_a_named_buffer_with_its_value() -> None:
    model = PlainAttribute()
    program = trace_and_compare(model, model.example_inputs())
    variable = program.variables["constant_3"]
    assert (variable.shape, variable.is_parameter, variable.persistent) == ((), False, False)
    assert program.graph_module.get_buffer("constant_3").item() == 3.0
    check_structure(program)


def test_model_keeps_its_constant() -> None:
    model = PlainAttribute()
    program = trace(model)
    run_program(program, model, model.example_inputs())
    assert model.factor.item() == 3.0


def test_constant_whose_value_is_lost_is_refused() -> None:
    with pytest.raises(TraceError, match=r"a constant of shape \(6,\) .* loses its value. Make it"):
        trace(Apply(lambda m, x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_list_of_lists_alone_is_refused() -> None:
    with pytest.raises(TraceError, match="loses its value"):
        trace(Apply(lambda m, x: x[[[0, 1], [2, 3]]]))


def test_tensor_is_itself_again_after_tracing() -> None:
    trace(Apply(lambda m, x: x * tensor(x, 2.5)))
    assert torch.tensor([1.5]).tolist() == [1.5]
    assert torch.arange(3)[[1]].tolist() == [1]

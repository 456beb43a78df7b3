"""Ops with several results: one node for the op, one for each result that is used."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn

import ilm_compile
from ilm_compile.errors import ProgramError
from ilm_compile.kernels import add_rms_norm
from ilm_compile.passes import lower
from ilm_compile.program.check import check_structure
from ilm_compile.program.copy import copy_program
from ilm_compile.program.diff import diff
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace
from ilm_compile.program.values import is_tuple, shapes_of
from ilm_compile.proof.exact import exact
from ilm_compile.proof.values import check_values
from ilm_compile.rewrite.cut_points import crossing_bytes
from tests.program.execute import run_model, run_program
from tests.support.layouts import placed

SHAPE = (2, 4, 6)


class Stream(nn.Module):
    """A model that calls a fused op itself and uses both of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, dtype=torch.float64)
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, 6, dtype=torch.float64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y, total = add_rms_norm(self.linear(x), x, self.weight, 1e-5)
        return {"loss": (y * total).sum()}


def traced() -> Program:
    return copy_program(trace(Stream(), example_inputs={"x": (SHAPE, torch.float64)}))


def parts(program: Program) -> tuple[fx.Node, fx.Node, fx.Node]:
    (call,) = [node for node in program.calls() if is_tuple(node)]
    first, second = sorted(call.users, key=lambda item: int(item.args[1]))  # type: ignore[arg-type]
    return call, first, second


def test_a_model_may_call_such_an_op() -> None:
    program, model = traced(), Stream()
    call, first, second = parts(program)
    assert shapes_of(call) == (SHAPE, SHAPE)
    assert [item.target for item in (first, second)] == [operator.getitem] * 2
    batch = {"x": torch.randn(SHAPE, dtype=torch.float64)}
    (values, gradients), (expected, wanted) = (
        run_program(program, model, batch),
        run_model(model, batch),
    )
    torch.testing.assert_close(values["loss"], expected["loss"])
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_dump_shows_all_types_and_which_result_is_taken() -> None:
    text = traced().dump()
    assert 'add_rms_norm: "float64[2, 4, 6], float64[2, 4, 6]" = ilm.add_rms_norm(' in text
    assert "= add_rms_norm[1]" in text


def test_diff_of_a_changed_result() -> None:
    program, changed = traced(), traced()
    call = parts(changed)[0]
    call.meta["val"] = tuple(value.float() for value in call.meta["val"])
    assert diff(program, traced()) == ""
    assert "dtype" in diff(program, changed)


def another_region(call: fx.Node, item: fx.Node) -> None:
    item.meta["stage"] = 1


def used_whole(call: fx.Node, item: fx.Node) -> None:
    item.replace_all_uses_with(call, delete_user_cb=lambda user: user.op != "output")


def item_of_a_tensor(call: fx.Node, item: fx.Node) -> None:
    item.args = (call.all_input_nodes[0], 0)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (another_region, "in another stage than add_rms_norm, whose result it is"),
        (used_whole, "a value of several tensors is used whole"),
        (item_of_a_tensor, "getitem of what is no value of several tensors"),
    ],
)
def test_structure_is_checked(edit, message: str) -> None:
    program = traced()
    call, first, _ = parts(program)
    edit(call, first)
    with pytest.raises(ProgramError, match=message):
        check_structure(program)


def test_value_check_sees_each_result() -> None:
    program = traced()
    check_values(program)
    call, *_ = parts(program)
    first, second = call.meta["val"]
    call.meta["val"] = (first, second.float())
    with pytest.raises(ProgramError, match=r"gives float64.*, but the program says .*float32"):
        check_values(program)


def test_exact_widens_each_result() -> None:
    program = traced()
    call, *_ = parts(program)
    call.meta["val"] = tuple(value.float() for value in call.meta["val"])
    assert {v.dtype for v in parts(exact(program))[0].meta["val"]} == {torch.float64}


def test_no_stage_begins_between_an_op_and_its_results() -> None:
    program = traced()
    calls = list(program.calls())
    call, *_ = parts(program)
    position = calls.index(call) + 1
    assert crossing_bytes(calls)[position] == float("inf")
    for index, node in enumerate(calls):
        node.meta["stage"] = int(index >= position)
    with pytest.raises(ProgramError, match="has several results and would be sent to stage 1"):
        lower(program)


def test_results_are_placed_alike_and_moved_one_by_one() -> None:
    program = ilm_compile.partition(
        Stream(), example_inputs={"x": (SHAPE, torch.float64)}, tp=2, sequence_parallel=True
    )
    call, first, second = parts(program)
    placements = {str(placed(node)) for node in (call, first, second)}
    assert placements == {"S(1)"}
    assert shapes_of(call) == ((2, 2, 6), (2, 2, 6))

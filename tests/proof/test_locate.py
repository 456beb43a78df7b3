"""The first node that differs, in value or in gradient, and what can be told of it."""

from __future__ import annotations

import pytest
import torch

from ilm_compile.passes import insert_after, wrap
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.plan import Plan
from ilm_compile.program.trace import trace
from ilm_compile.proof.inputs import corner_batch, microbatch
from ilm_compile.proof.locate import first_difference
from ilm_compile.proof.narrow import EQUAL_TARGETS, narrow
from ilm_compile.proof.numbers import Side, run
from tests.proof.small import INPUTS, compile_model, make_model

aten = torch.ops.aten


@pytest.fixture(scope="module")
def model():
    return make_model("internlm2")


def find(model, program):
    traced = trace(model, example_inputs=INPUTS)
    inputs = microbatch(traced, corner_batch(traced, 1))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    sides = [Side.of(traced), Side.of(program)]
    seeds = [torch.ones((), dtype=torch.float64), None]
    runs = [run(side, tensors, inputs, seeds) for side in sides]
    return first_difference(*sides, *runs, tolerance=1e-10)


def linear(program, module):
    return next(
        n
        for n in program.calls()
        if n.target is aten.linear.default and program.source(n).module_path == module
    )


@pytest.mark.parametrize("plan", [{}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}], ids=str)
def test_a_right_program_has_no_difference(model, plan):
    assert find(model, compile_model(model, **plan)) is None


def test_a_wrong_value_is_found_where_it_arises(model):
    program = compile_model(model, tp=2)
    node = next(n for n in program.calls() if n.name == "silu")
    node.target = aten.relu.default
    program.finish()
    found = find(model, program)
    assert (found.node, found.what) == ("silu", "value")
    assert "layers.0.feed_forward" in found.where
    assert found.how == ""


def test_a_wrong_gradient_is_found_where_backward_reaches_it(model):
    program = compile_model(model)
    node = linear(program, "layers.1.attention.wo")
    wrap(program, node, lambda x: x * 3 - x.detach() * 2)
    program.finish()
    found = find(model, program)
    assert (found.node, found.what) == (node.name, "gradient")
    assert found.error == pytest.approx(2)
    assert found.how == "it is 3 times what it should be"
    assert "detach" not in found.where


def test_the_collective_beside_a_wrong_value_is_named(model):
    program = compile_model(model, tp=2, sequence_parallel=False)
    node = linear(program, "layers.0.feed_forward.w2")
    (reduced,) = node.users
    (total,) = reduced.users
    wrong = insert_after(program, reduced, redistribute, reduced, src="I", dst="P", axis="tp")
    total.replace_input_with(reduced, wrong)
    program.finish()
    found = find(model, program)
    assert (found.node, found.what) == (total.name, "value")
    assert found.beside == (f"{wrong.name} I -> P",)


def test_a_parameter_whose_gradient_alone_is_wrong_is_found(model):
    program = compile_model(model)
    norm = program.graph.find_nodes(op="get_attr", target="norm.weight") or [
        n for n in program.graph.find_nodes(op="get_attr") if "norm" in str(n.target)
    ]
    wrap(program, norm[0], lambda x: x * 2 - x.detach())
    program.finish()
    found = find(model, program)
    assert (found.node, found.what) == (norm[0].name, "gradient")
    assert "it is 2 times what it should be" in str(found)


BATCH = {"labels": torch.tensor([[1, -100], [1, 2]])}


def test_narrowing_tries_only_what_the_plan_has():
    tried = []
    narrow(Plan(tp=2), BATCH, lambda plan, batch: tried.append(plan))
    assert tried == [Plan(tp=1), Plan(tp=2)]


def test_narrowing_says_what_makes_the_step_right():
    plan = Plan(pp=2, num_microbatches=4)
    text = narrow(plan, BATCH, lambda plan, batch: plan.pp == 1)
    assert text == (
        "right with one pipeline stage: stages, what they send each other, or copies of a tied "
        "parameter"
    )


def test_narrowing_gives_every_row_its_targets():
    text = narrow(Plan(), BATCH, lambda plan, batch: bool(batch["labels"].ge(0).all()))
    assert text.startswith(f"right with {EQUAL_TARGETS}")


def test_narrowing_admits_that_nothing_helps():
    assert narrow(Plan(tp=2), BATCH, lambda plan, batch: False) == (
        "nothing simpler is right either"
    )

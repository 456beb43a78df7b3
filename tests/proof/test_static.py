"""The checks of verify that run nothing: values, variables, and a program made exact."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from ilm_compile.errors import ProgramError
from ilm_compile.partitioning import make_schedule
from ilm_compile.passes import lower
from ilm_compile.program.trace import trace
from ilm_compile.proof.compare import compare
from ilm_compile.proof.emulate import emulate
from ilm_compile.proof.exact import exact
from ilm_compile.proof.promote import promoted_float32
from ilm_compile.proof.reference import single_device_step
from ilm_compile.proof.static import check_variables
from ilm_compile.proof.values import check_values
from tests.proof.small import INPUTS, compile_model, make_batch, make_model

aten = torch.ops.aten
BF16 = torch.bfloat16


def bf16_program(name="internlm2", **plan):
    return compile_model(make_model(name).float(), dtype=BF16, **plan)


@pytest.mark.parametrize("name", ["internlm2", "hf-llama", "hf-gpt2"])
def test_values_of_a_compiled_program_are_what_its_ops_give(name):
    check_values(bf16_program(name, tp=2, pp=2))


def test_a_missing_cast_is_refused():
    program = bf16_program()
    linear = next(n for n in program.calls() if n.name == "linear")
    node = linear.args[0]
    assert node.target is aten.to.dtype
    node.replace_all_uses_with(node.args[0])
    with pytest.raises(ProgramError, match=r"value check: .*Is a cast missing|cannot run on"):
        check_values(program)


def test_a_product_of_two_dtypes_is_refused():
    program = bf16_program()
    linear = next(n for n in program.calls() if n.name == "linear")
    weight = linear.args[1]
    assert weight.target is aten.to.dtype
    linear.replace_input_with(weight, weight.args[0])  # without data torch lets it pass
    with pytest.raises(ProgramError, match="takes one dtype, got bfloat16 and float32"):
        check_values(program)


def test_a_global_size_in_a_rank_local_program_is_refused():
    program = compile_model(make_model("internlm2"), tp=2)
    node = next(n for n in program.calls() if n.name == "linear")
    node.meta["val"] = node.meta["val"].new_empty((2, 8, 64))
    expected = re.escape(
        "value check: aten.linear.default of (float64[2, 8, 32], float64[32, 32]) gives "
        "float64[2, 8, 32], but the program says float64[2, 8, 64] at node linear"
    )
    with pytest.raises(ProgramError, match=expected):
        check_values(program)


def test_an_op_that_cannot_run_is_refused_with_its_reason():
    program = compile_model(make_model("internlm2"))
    node = next(n for n in program.calls() if n.name == "linear")
    node.args = (node.args[1], node.args[0])
    with pytest.raises(ProgramError, match=r"aten\.linear\.default cannot run on .* at node"):
        check_values(program)


@pytest.mark.parametrize("plan", [{"tp": 2}, {"tp": 2, "pp": 2, "checkpoint": True}], ids=str)
def test_a_bf16_program_made_exact_equals_the_plain_model(plan):
    model, program = make_model("hf-llama"), bf16_program("hf-llama", **plan)
    batch = make_batch(program)
    [step] = emulate(lower(exact(program)), make_schedule(program.plan), model, [batch])
    with promoted_float32():
        expected = single_device_step(model, batch)
    found = compare(step, expected)
    assert found.is_equal(1e-12), found.describe(1e-12)


def test_making_a_program_exact_leaves_the_original_alone():
    program = bf16_program()
    before = program.dump()
    exact(program)
    assert program.dump() == before
    assert program.variables["output.weight"].dtype == torch.float32


def changed(**facts):
    def change(program):
        program.variables["norm.weight"] = replace(program.variables["norm.weight"], **facts)

    return change


def added(program):
    name = "layers.9.weight"
    program.variables[name] = replace(program.variables["norm.weight"], name=name)


FAULTS = {
    "norm.weight has requires_grad False; the model has True": changed(requires_grad=False),
    "norm.weight has further names ('a',); the model has ()": changed(aliases=("a",)),
    "norm.weight has dtype torch.float32; the model has torch.float64": changed(
        dtype=torch.float32
    ),
    "norm.weight has shape (16,); the model has (32,)": changed(shape=(16,)),
    "norm.weight has being saved False; the model has True": changed(persistent=False),
    "norm.weight is gone": lambda program: program.variables.pop("norm.weight"),
    "layers.9.weight is new": added,
    "inputs are {}": lambda program: setattr(program, "inputs", {}),
    "output_names are ('other',)": lambda program: setattr(program, "output_names", ("other",)),
    "num_targets is counted in another way": lambda program: program.target_counts.clear(),
}


@pytest.mark.parametrize("words", FAULTS)
def test_variables_inputs_and_outputs_are_the_model_s(words):
    model = make_model("internlm2")
    traced, program = trace(model, example_inputs=INPUTS), compile_model(model, tp=2)
    check_variables(traced, program)
    FAULTS[words](program)
    with pytest.raises(ProgramError, match=re.escape(words)):
        check_variables(traced, program)

"""The checks of verify that run nothing: values, blocks, and a program made exact."""

from __future__ import annotations

import re

import pytest
import torch

from ilm_compile.compile import make_schedule
from ilm_compile.errors import ProgramError
from ilm_compile.passes import lower
from ilm_compile.verify import zoo
from ilm_compile.verify.blocks import check_blocks, placed_otherwise
from ilm_compile.verify.compare import compare
from ilm_compile.verify.emulate import emulate
from ilm_compile.verify.exact import exact
from ilm_compile.verify.promote import promoted_float32
from ilm_compile.verify.reference import single_device_step
from ilm_compile.verify.values import check_values
from tests.verify.small import compile_model, make_batch, make_model

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


def internlm2(num_layers, hidden=32, **plan):
    model = zoo.make_model(
        lambda: zoo.internlm2_tiny(
            **{**zoo.SIZES, "num_layers": num_layers, "hidden_size": hidden},
            num_kv_attention_heads=2,
        )
    )
    return compile_model(model, **plan)


def test_a_small_model_speaks_for_a_bigger_one_of_the_same_plan():
    big = internlm2(4, hidden=64, tp=2, sequence_parallel=True)
    small = internlm2(2, tp=2, sequence_parallel=True)
    check_blocks(big, small)
    assert placed_otherwise(big, small) == []


def test_a_deep_block_that_a_pass_changed_is_refused():
    big = internlm2(3, tp=2)
    node = next(n for n in big.calls() if n.name == "silu_2")
    node.target = aten.relu.default
    expected = (
        r"layers\.2 of the full-size program is like no block that took the step: it has \[relu"
    )
    with pytest.raises(ProgramError, match=expected):
        check_blocks(big, internlm2(2, tp=2))


def test_a_deep_block_that_skips_its_predecessor_is_refused():
    """Megatron-LM#1304: layers were lost without a word."""
    big = internlm2(4)
    last = {n.meta["region"]: n for n in big.calls() if big.regions[n.meta["region"]].is_block}
    one, two, *_ = [last[index] for index in sorted(last)][1:]
    two.replace_all_uses_with(one)
    with pytest.raises(ProgramError, match=r"layers\.3 .* has \[rms_norm.default\(-1 of 2 blocks"):
        check_blocks(big, internlm2(2))


def test_a_block_that_differs_from_its_small_self_is_refused():
    big = internlm2(2)
    node = next(n for n in big.calls() if n.name == "silu")
    node.target = aten.relu.default
    with pytest.raises(
        ProgramError, match=r"layers\.0 .* does not make the calls that it makes in"
    ):
        check_blocks(big, internlm2(2))


def test_other_placements_than_those_stepped_are_named():
    big = internlm2(2, tp=2, sequence_parallel=True)
    small = internlm2(2, tp=2, sequence_parallel=False)
    check_blocks(big, small)
    assert {"layers.0", "layers.1"} <= set(placed_otherwise(big, small))

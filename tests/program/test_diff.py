"""The difference of two programs: empty if equal, one line per node that differs."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ilm_compile.models import internlm2_tiny
from ilm_compile.passes import (
    ActivationCheckpoint,
    CastBF16,
    PipelineSplit,
    TensorParallel,
    insert_after,
    nodes_in,
    replace,
    replace_call,
    run_passes,
    wrap,
)
from ilm_compile.program.copy import copy_program
from ilm_compile.program.diff import diff
from ilm_compile.program.program import Program
from ilm_compile.program.trace import trace

aten = torch.ops.aten


@pytest.fixture(scope="module")
def before() -> Program:
    return trace(internlm2_tiny(num_layers=2, hidden_size=32, num_attention_heads=4))


@pytest.fixture
def after(before: Program) -> Program:
    return copy_program(before)


def silu(program: Program) -> torch.fx.Node:
    (found,) = [n for n in nodes_in(program, "layers.1") if n.target is aten.silu.default]
    return found


def test_copy_is_equal_and_independent(before: Program, after: Program) -> None:
    assert diff(before, after) == ""
    assert before.dump() == after.dump()
    text = before.dump()
    run_passes(after, [TensorParallel(size=2), ActivationCheckpoint(fraction=True)])
    assert before.dump() == text
    assert "sharded" not in before.facts
    assert not any(v.layout.is_shard for v in before.variables.values())


def test_two_traces_are_equal(before: Program) -> None:
    again = trace(internlm2_tiny(num_layers=2, hidden_size=32, num_attention_heads=4))
    assert diff(before, again) == ""


def test_order_of_independent_nodes_is_no_difference(before: Program, after: Program) -> None:
    up = next(n for n in nodes_in(after, "layers.1.feed_forward.w3"))
    silu(after).prev.append(up)
    up.append(silu(after))
    assert diff(before, after) == ""


def test_inserted_node_and_its_user(before: Program, after: Program) -> None:
    wrap(after, silu(after), torch.neg)
    assert diff(before, after).splitlines() == [
        "--- 113 nodes, after no pass",
        "+++ 114 nodes, after no pass",
        "@@ layers.1 @@",
        '+ neg_1: "float32[1, 64, 256]" = aten.neg(silu_1)  # layers.1.feed_forward',
        "~ mul_18: args (silu_1, linear_8) -> (neg_1, linear_8)  # layers.1.feed_forward",
    ]


def test_difference_is_symmetric(before: Program, after: Program) -> None:
    wrap(after, silu(after), torch.neg)
    lines = diff(after, before).splitlines()
    assert lines[3].startswith("- neg_1: ")
    assert lines[4].endswith(
        "args (neg_1, linear_8) -> (silu_1, linear_8)  # layers.1.feed_forward"
    )


def test_replaced_nodes_are_grouped_by_region(before: Program, after: Program) -> None:
    def pattern(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    replace(after, pattern, lambda gate, up: gate - up)
    text = diff(before, after)
    assert text.count("@@ layers.") == 2
    signs = [line[0] for line in text.splitlines() if line[0] in "+-~"][2:]
    assert sorted(signs) == sorted(["-", "-", "+", "~"] * 2)


def test_changed_scalar(before: Program, after: Program) -> None:
    norm = next(n for n in after.calls() if n.target is aten.rms_norm.default)
    norm.args = (*norm.args[:3], 1e-3)
    lines = diff(before, after).splitlines()[3:]
    assert len(lines) == 1
    assert lines[0].startswith("~ rms_norm: args ")
    assert "1e-05) -> " in lines[0]
    assert lines[0].endswith("0.001)  # layers.0.attention_norm")


def test_changed_op_is_removed_and_added(before: Program, after: Program) -> None:
    old = silu(after)
    replace_call(after, old, aten.relu.default, *old.args)
    lines = diff(before, after).splitlines()[3:]
    assert [line.split(":")[0] for line in lines] == ["- silu_1", "+ relu", "~ mul_18"]


def test_dtype(before: Program, after: Program) -> None:
    run_passes(after, [CastBF16()])
    assert "~ silu_1: dtype float32 -> bfloat16  # layers.1.feed_forward" in diff(before, after)


def test_placement_and_shape(before: Program, after: Program) -> None:
    run_passes(after, [TensorParallel(size=2)])
    text = diff(before, after)
    assert "after tensor-parallel\n" in text
    assert "~ silu_1: shape [1, 64, 256] -> [1, 64, 128]; placement none -> S(2)" in text
    assert "@@ variables @@\n~ tok_embeddings_weight: " in text
    assert "src='P', dst='I'" in text


def test_stage_and_clone(before: Program, after: Program) -> None:
    run_passes(after, [PipelineSplit(num_stages=2)])
    text = diff(before, after)
    assert "~ silu_1: stage None -> 1" in text
    assert "~ cos: stage None -> clone" in text


def test_recompute(before: Program, after: Program) -> None:
    run_passes(after, [ActivationCheckpoint(fraction=0.5)])
    assert diff(before, after).splitlines()[2:] == [
        "@@ regions @@",
        "~ layers.1: recompute False -> True",
    ]


def test_output(before: Program, after: Program) -> None:
    loss = after.outputs[0]
    scaled = insert_after(after, loss, aten.mul.Tensor, loss, 2.0)
    loss.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
    assert "@@ outputs @@\n~ output: args " in diff(before, after)

"""FuseResidual: sums with the stream and their norms, where they are one op and where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import ilm_compile
from tests.support.fused import (
    ADD_NORM,
    INPUTS,
    Body,
    count,
    fused,
    partitioned,
    traced,
    traced_model,
)

aten, ilm = torch.ops.aten, torch.ops.ilm


def normed_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return F.rms_norm(total, (6,), eps=1e-6), total


def test_others_read_the_sum_of_a_fused_residual() -> None:
    program = fused(traced(lambda m, x: normed_sum(x, x.exp())))
    (node,) = program.graph.find_nodes(op="call_function", target=ilm.add_rms_norm.default)
    assert sorted(item.args[1] for item in node.users) == [0, 1]
    assert node.args[1].target is aten.mul.Tensor  # the older term is the stream
    assert not program.graph.find_nodes(op="call_function", target=aten.add_.Tensor)


def test_sum_in_place_is_a_sum_like_another_once_traced() -> None:
    def function(m: Body, x: Tensor) -> Tensor:
        y = x.exp()
        y += x
        return F.rms_norm(y, (6,), eps=1e-6)

    assert count(fused(traced(function))) == {ADD_NORM: 1}


def used_before(m: Body, x: Tensor) -> Tensor:
    total = x + x.exp()
    return F.rms_norm(total, (6,), m.weight * total.sum((0, 1, 2)), 1e-6)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (used_before, "its sum is used before the norm"),
        (lambda m, x: normed_sum(x, m.weight), "its terms are not alike"),
        (lambda m, x: normed_sum(x, torch.tensor(0.5)), "its terms are not alike"),
        (lambda m, x: F.rms_norm(torch.add(x, x, alpha=2), (6,)), "no two tensors of equal weight"),
    ],
    ids=["used before", "broadcast", "number", "alpha"],
)
def test_residual_left_alone_with_the_reason(function: Any, reason: str) -> None:
    result = fused(traced(function))
    assert ADD_NORM not in count(result)
    assert any(d.startswith("fuse-residual") and reason in d for d in result.decisions)


def test_sum_that_a_pass_changes_in_place_is_left_alone() -> None:
    program = traced(lambda m, x: normed_sum(x, x.exp()))
    (total,) = program.graph.find_nodes(op="call_function", target=aten.add.Tensor)[:1]
    loss_sum = [user for user in total.users if user.target is aten.sum.default]
    with program.graph.inserting_before(loss_sum[0]):
        changed = program.graph.call_function(aten.add_.Tensor, (total, total))
    changed.meta = dict(total.meta)
    loss_sum[0].args = (changed,)
    program.finish()
    result = fused(program)
    assert ADD_NORM not in count(result)
    assert any("its sum is changed in place" in d for d in result.decisions)


@pytest.mark.parametrize(
    ("plan", "reason", "fused_sums"),
    [
        ({"pp": 2}, "its norm begins the next stage", 3),
        ({"checkpoint": True}, "its norm begins a recomputed block", 3),
        ({"tp": 2, "sequence_parallel": True}, "", 4),
    ],
    ids=["stages", "recompute", "sequence parallel"],
)
def test_sums_across_blocks_depend_on_stages_and_recompute(
    plan: dict[str, Any], reason: str, fused_sums: int
) -> None:
    program = partitioned(**plan)
    assert count(program)[ADD_NORM] == fused_sums
    assert any(reason in d for d in program.decisions)


def test_a_stage_still_receives_the_residual_stream_alone() -> None:
    plain = ilm_compile.partition(
        traced_model("InternLM2")[0], example_inputs=INPUTS, kernels="torch", pp=2
    )
    boundaries = [
        ilm_compile.passes.lower(p).stages[1].received for p in (plain, partitioned(pp=2))
    ]
    assert [b.shape for b in boundaries[0]] == [b.shape for b in boundaries[1]]
    assert len(boundaries[1]) == 1

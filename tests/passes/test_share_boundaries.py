"""Boundaries of packed documents: one call of a stage for a micro-batch, whatever divides them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

import ilm_compile
from ilm_compile.models import internlm2_tiny
from ilm_compile.ops.attention import BOUNDARIES, QUERY_BOUNDARIES
from ilm_compile.passes import lower
from ilm_compile.program.layout import layout_of
from ilm_compile.program.placement import S

LAYERS, ROWS, SEQ, VOCAB = 4, 2, 16, 64
BOUNDS = torch.tensor([[0, 3, 9, SEQ], [0, SEQ, SEQ, SEQ]], dtype=torch.int32)
EXAMPLE = {
    "input_ids": ((ROWS, SEQ), torch.int64),
    "labels": ((ROWS, SEQ), torch.int64),
    "cu_seqlens": (tuple(BOUNDS.shape), torch.int32),
}
PLANS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "tp": {"tp": 2},
    "fused, bf16": {"kernels": "triton", "dtype": "bfloat16"},
    "by heads": {"cp": 2, "cp_attention": "heads"},
    "by queries": {"cp": 2, "cp_attention": "queries"},
    "in a ring": {"cp": 2, "cp_attention": "ring", "tp": 2},
}
plans = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


def model() -> torch.nn.Module:
    return internlm2_tiny(num_layers=LAYERS, vocab_size=VOCAB)


def partition(plan: dict[str, Any], **more: Any) -> ilm_compile.Program:
    return ilm_compile.partition(model(), example_inputs=EXAMPLE, **plan, **more)


def made(graph: fx.Graph) -> list[fx.Node]:
    kinds = (BOUNDARIES, QUERY_BOUNDARIES)
    return [node for node in graph.nodes if node.target in kinds]


@plans
def test_all_layers_read_one_call(plan: dict[str, Any]) -> None:
    (node,) = made(partition(plan).graph)
    assert len(node.users) == LAYERS


@plans
def test_each_stage_has_a_call_of_its_own(plan: dict[str, Any]) -> None:
    program = partition(plan, pp=2, num_microbatches=2)
    for stage in lower(program).stages:
        regions = [m for m in stage.module.children() if isinstance(m, fx.GraphModule)]
        counts = {name: len(made(m.graph)) for name, m in stage.module.named_children()}
        assert len(regions) > 1
        assert {name for name, count in counts.items() if count} == {"shared"}
        assert counts["shared"] == 1
        assert not any("boundaries" in value.name for value in stage.received)


def test_boundaries_of_queries_are_each_rank_s_own() -> None:
    (node,) = made(partition(PLANS["by queries"]).graph)
    assert layout_of(node).on("cp") == S(0)


def test_where_keys_travel_the_host_reads_them() -> None:
    (node,) = made(partition(PLANS["in a ring"]).graph)
    assert node.target is BOUNDARIES
    assert node.args[-1] is True


def test_the_pass_runs_for_documents_only() -> None:
    whole = {name: spec for name, spec in EXAMPLE.items() if name != "cu_seqlens"}
    for example, runs in ((EXAMPLE, True), (whole, False)):
        program = ilm_compile.partition(model(), example_inputs=example)
        assert any("share-boundaries" in line for line in program.pass_log) is runs


class Count(TorchDispatchMode):
    """Counts the calls that make boundaries."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is BOUNDARIES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpoint", [False, True, "selective"], ids=str)
def test_a_step_makes_them_once_a_micro_batch_and_keeps_them_once(checkpoint: Any) -> None:
    """Forward, backward and recompute together."""
    parallel = ilm_compile.parallelize(
        model(), example_inputs=EXAMPLE, num_microbatches=3, checkpoint=checkpoint
    )
    ids = torch.randint(VOCAB, (3 * ROWS, SEQ))
    batch = {"input_ids": ids, "labels": ids, "cu_seqlens": BOUNDS.repeat(3, 1)}
    kept: set[int] = set()

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.int32 and x.dim() == 4:
            kept.add(x.untyped_storage().data_ptr())
        return x

    with Count() as count, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        parallel.execute_schedule(batch)
    assert count.calls == 3
    assert len(kept) <= 3

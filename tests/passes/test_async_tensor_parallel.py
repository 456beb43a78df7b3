"""Collectives of tokens that run beside the products next to them: where, where not, and equal."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import ilm_compile
from ilm_compile.cost import saved_bytes
from ilm_compile.errors import PlanError
from ilm_compile.passes import AsyncTensorParallel
from ilm_compile.planner.simulated import simulate_step
from ilm_compile.program.collectives import redistribute
from ilm_compile.program.program import Program
from ilm_compile.program.ring_products import gather_products, product_scatter
from ilm_compile.program.step_traffic import predicted_traffic
from tests.support.equality import EXAMPLE, Case, assert_equal, make_model
from tests.support.world import World

CUT: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
ASYNC = {**CUT, "async_tensor_parallel": True}
RECOMPUTED = {"checkpoint": 0.5, "num_microbatches": 3}


def partition(name: str, **plan: Any) -> Program:
    return ilm_compile.partition(make_model(name), example_inputs=EXAMPLE, **plan)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("internlm", {}),  # its products have biases, and its weights are cut in segments
        ("internlm", {"tp": 4, "kernels": "triton"}),
        ("internlm2", {"tp": 4, "checkpoint": "selective"}),
        ("internlm2", {"compile": "aot_eager", "kernels": "triton", "checkpoint": True}),
        ("llama", {"pp": 2, **RECOMPUTED}),
    ],
    ids=str,
)
def test_equals_the_model_in_emulation(name: str, plan: dict[str, Any]) -> None:
    options = {**ASYNC, **plan}
    report = ilm_compile.verify(make_model(name), example_inputs=EXAMPLE, **options)
    assert report.ok, report
    assert max(report.max_loss_error, report.max_grad_error) < 1e-10


def test_is_within_the_bounds_of_bfloat16() -> None:
    model, options = make_model("internlm2").float(), {**ASYNC, "dtype": torch.bfloat16}
    report = ilm_compile.verify(model, example_inputs=EXAMPLE, **options)
    assert report.ok, report


@pytest.mark.parametrize(
    "case",
    [
        Case("internlm", ASYNC),
        Case("internlm2", {**ASYNC, **RECOMPUTED}),
        Case("llama", {**ASYNC, "compile": "aot_eager"}),
    ],
    ids=str,
)
def test_equals_the_model_in_real_processes(case: Case, world2: World) -> None:
    assert_equal(world2, case, 1e-10)


def test_products_that_read_one_gathered_value_share_its_ring() -> None:
    program = partition("llama", **ASYNC)
    gathers = program.graph.find_nodes(op="call_function", target=gather_products)
    shared = Counter(len(node.args[1]) for node in gathers)  # type: ignore[arg-type]
    assert shared == {3: 4, 2: 4, 1: 1}  # q, k and v; gate and up; the head
    assert len(program.graph.find_nodes(op="call_function", target=product_scatter)) == 8
    left = program.graph.find_nodes(op="call_function", target=redistribute)
    assert Counter(str(node.kwargs["src"]) for node in left) == {"P": 1, "I": 19}
    said = "async-tensor-parallel: 9 gathers run beside the products that read them, 8 scatters "
    assert program.decisions[-1].startswith(said)


@pytest.mark.parametrize("name", ["internlm", "llama"])
def test_no_more_is_sent_kept_or_computed(name: str) -> None:
    plain, fused = (partition(name, **plan) for plan in (CUT, ASYNC))
    sent = [
        sum(kind.num_bytes for step in predicted_traffic(each) for kind in step.values())
        for each in (plain, fused)
    ]
    assert sent[0] == sent[1]
    assert sum(saved_bytes(plain).values()) == sum(saved_bytes(fused).values())
    assert plain.flops == fused.flops


def test_a_step_is_priced_as_what_takes_longer() -> None:
    example = {key: ((1, 4096), torch.int64) for key in EXAMPLE}
    seconds = {}
    for plan in (CUT, ASYNC):
        with torch.device("meta"):
            model = ilm_compile.models.internlm2_tiny(hidden_size=2048, num_layers=1)
        program = ilm_compile.partition(
            model, example_inputs=example, dtype=torch.bfloat16, kernels="triton", **plan
        )
        seconds[len(plan)] = simulate_step(program).seconds
    assert 0.5 * seconds[2] < seconds[3] < 0.98 * seconds[2]


def test_explain_names_each_ring() -> None:
    text = partition("internlm2", **ASYNC).explain()
    assert "layers.0.attention.wqkv   beside a product  shift 8 KiB  shift 8 KiB " in text


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"tp": 1}, "plan: async_tensor_parallel=True needs tp > 1, got tp=1"),
        ({"tp": 2, "sequence_parallel": False}, "that tp ranks share, got sequence_parallel=False"),
        ({**CUT, "async_tensor_parallel": 1}, "must be True or False, got 1"),
        ({**CUT, "cp": 2}, "expected tokens that no axis but tp cuts, got cp=2"),
        ({**CUT, "pp": 2, "schedule": "zb_h1"}, "the schedule 'zb_h1' leaves gradients of weights"),
    ],
    ids=["one-rank", "whole-tokens", "a-number", "context", "split-schedule"],
)
def test_what_it_cannot_do_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        partition("internlm2", **{"async_tensor_parallel": True, **plan})


def test_a_plan_with_nothing_to_run_beside_a_product_is_refused() -> None:
    with pytest.raises(PlanError, match=r"expected gathers of tokens before linear layers.*found"):
        partition("internlm2", **{**ASYNC, "sequence_parallel": None})  # nothing is worth cutting


def test_it_can_be_disabled() -> None:
    program = partition("internlm2", **ASYNC, disable=[AsyncTensorParallel.name])
    assert not program.graph.find_nodes(op="call_function", target=gather_products)
